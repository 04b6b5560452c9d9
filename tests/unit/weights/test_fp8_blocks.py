"""Compares blocks with an independent formula for many shapes, including zeros and subnormals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rasft.tools.conversion.fp8_folders import quantization_config, quantized
from megatron_rasft.weights import fp8_blocks
from megatron_rasft.weights.fp8_blocks import (
    BLOCK,
    is_linear_layer,
    scale_shape,
)
from tests.unit.weights.dequantizing import dequantize_blocks


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    exponent=st.integers(-40, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_block_has_its_own_scale(rows: int, columns: int, exponent: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    weight = (torch.randn(rows, columns, generator=generator) * 2.0**exponent).to(dtype)
    values, scales = quantized(weight)
    assert scales.shape == scale_shape((rows, columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            largest = weight[block].double().abs().max()
            assert abs(scales[i, j].double() - largest / 448) <= largest / 448 * 1e-6
            scaled = weight[block].double() / scales[i, j].double()
            # half a step: of a mantissa of 3 bits, or of the smallest subnormal, 2 ** -9
            error = (values[block].double() - scaled).abs()
            assert (error <= torch.maximum(scaled.abs() / 16, torch.tensor(2.0**-10)) * 1.0001).all()
    assert dequantize_blocks(values, scales).isfinite().all()


def test_zeros_and_numbers_too_small_for_a_scale_stay_zero() -> None:
    weight = torch.zeros(130, 130)
    weight[129, 129] = 1e-45
    values, scales = quantized(weight)
    assert (scales == 1).all() and (values.float() == 0).all()


def nearest_e4m3(value: float) -> set[float]:
    """The representable numbers nearest to ``value``: one, or two if it lies halfway between them."""
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    grid = grid[~grid.isnan()]
    distance = (grid - value).abs()
    return set(grid[distance <= distance.min() * (1 + 1e-6)].tolist())


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 257), (5, 3), (1, 128), (300, 127)])
def test_every_block_is_scaled_to_the_largest_value_and_rounded_to_nearest(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    weight[: shape[0] // 2] *= 37.0
    values, scales = quantized(weight)
    exact = weight.double()
    picks = torch.randint(0, weight.numel(), (60,), generator=torch.Generator().manual_seed(2)).tolist()
    for row_start in range(0, shape[0], BLOCK):
        for column_start in range(0, shape[1], BLOCK):
            block = exact[row_start : row_start + BLOCK, column_start : column_start + BLOCK]
            scale = scales[row_start // BLOCK, column_start // BLOCK].double()
            assert scale.item() == pytest.approx(block.abs().max().item() / 448.0, rel=1e-6)
    for pick in picks:
        row, column = divmod(pick, shape[1])
        scale = scales[row // BLOCK, column // BLOCK].double().item()
        assert values[row, column].double().item() in nearest_e4m3(exact[row, column].item() / scale)


def test_no_value_becomes_nan() -> None:
    weight = torch.full((128, 128), 3.0e38) * torch.linspace(-1, 1, 128)
    values, _ = quantized(weight)
    assert not values.float().isnan().any()


@pytest.mark.parametrize("shape", [(128, 128), (1024, 128), (1030, 257), (2048, 130), (5, 3)])
def test_many_rows_at_once_as_on_a_gpu_give_the_same(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    one_by_one = quantized(weight)
    monkeypatch.setitem(fp8_blocks._ROWS_OF_BLOCKS, "cpu", fp8_blocks._ROWS_OF_BLOCKS["cuda"])
    values, scales = quantized(weight)
    assert torch.equal(scales, one_by_one[1])
    assert torch.equal(values.view(torch.uint8), one_by_one[0].view(torch.uint8))


def test_projections_with_one_row_per_head_stay_in_16_bits() -> None:
    layer = "model.layers.0"
    kept = [f"{layer}.linear_attn.in_proj_{name}" for name in ("a", "b", "ba")]
    kept += [f"{layer}.mlp.shared_expert_gate", f"{layer}.mlp.gate"]
    quantized = [
        f"{layer}.linear_attn.in_proj_qkv",
        f"{layer}.linear_attn.out_proj",
        f"{layer}.mlp.gate_proj",
    ]
    assert not any(is_linear_layer(f"{name}.weight", (4, 128)) for name in kept)
    assert all(is_linear_layer(f"{name}.weight", (128, 128)) for name in quantized)
    assert not is_linear_layer(f"{layer}.linear_attn.conv1d.weight", (384, 1, 4))
    names = [f"{name}.weight" for name in [*kept, *quantized, "lm_head", "model.embed_tokens"]]
    assert quantization_config(names)["modules_to_not_convert"] == [*kept, "lm_head"]
