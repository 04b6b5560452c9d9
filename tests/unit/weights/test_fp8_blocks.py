"""Blocks against the formula written out, whatever the shape, zeros and subnormals included."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rasft.weights.fp8_blocks import dequantize_blocks, quantized, scale_shape


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
