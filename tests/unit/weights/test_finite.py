from itertools import product

import pytest
import torch

from megatron_rasft.weights.finite import describe_overflow, is_finite

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bad_value_is_found_at_every_position(dtype: torch.dtype) -> None:
    """Vectorized reductions handle the last elements separately, so sizes around a vector's are tried."""
    for size, value in product((1, 2, 15, 16, 17, 33, 67), (float("nan"), float("inf"), float("-inf"))):
        for position in range(size):
            tensor = torch.linspace(-3, 3, size).to(dtype)
            assert is_finite(tensor)
            tensor[position] = value
            assert not is_finite(tensor), (size, position, value)


def test_views_empty_tensors_and_extremes() -> None:
    whole = torch.zeros(6, 8)
    whole[2, 5] = float("nan")
    assert is_finite(whole[:, :5]) and not is_finite(whole[:, 5:]) and is_finite(whole[3:])
    assert is_finite(torch.empty(0)) and is_finite(torch.tensor(1.0))
    for dtype in DTYPES:
        limits = torch.finfo(dtype)
        assert is_finite(torch.tensor([limits.max, limits.min, limits.tiny], dtype=dtype))


def test_overflow_names_value_and_limit() -> None:
    text = describe_overflow(torch.tensor([1.0, -70_000.0]), torch.float16)
    assert "7e+04" in text and "float16" in text and "6.55e+04" in text
