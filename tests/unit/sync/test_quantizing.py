"""Blockwise FP8 against the formula written out in fp64."""

import pytest
import torch

from megatron_rasft.sync.quantizing import BLOCK, LARGEST, quantize_blocks, scale_shape


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(scale_shape(tuple(weight.shape)))
    quantize_blocks(weight, values, scales)
    return values, scales


def nearest_e4m3(value: float) -> set[float]:
    """The representable numbers nearest to ``value``: one, or two where it lies in the middle."""
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
            assert scale.item() == pytest.approx(block.abs().max().item() / LARGEST, rel=1e-6)
    for pick in picks:
        row, column = divmod(pick, shape[1])
        scale = scales[row // BLOCK, column // BLOCK].double().item()
        assert values[row, column].double().item() in nearest_e4m3(exact[row, column].item() / scale)


def test_what_the_server_computes_is_within_half_a_step_of_the_weight() -> None:
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    values, scales = quantized(weight)
    whole = scales.double().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:200, :300]
    gap = (values.double() * whole - weight.double()).abs()
    # three bits of mantissa: half of 2**-3 of the value; below 2**-6 steps are fixed, of 2**-9
    assert torch.all(gap <= torch.maximum(weight.double().abs() * 2**-4, whole * 2**-10) * (1 + 1e-6))


def test_a_block_of_zeros_stays_zero() -> None:
    weight = torch.zeros(256, 128)
    weight[128:] = 2.0
    values, scales = quantized(weight)
    assert scales.flatten().tolist() == pytest.approx([1.0, 2.0 / LARGEST], rel=1e-6)
    assert values[:128].float().abs().max() == 0
    assert torch.all(values[128:].float() == LARGEST)


def test_no_value_becomes_nan() -> None:
    weight = torch.full((128, 128), 3.0e38) * torch.linspace(-1, 1, 128)
    values, _ = quantized(weight)
    assert not values.float().isnan().any()
