"""Tensors are found inside torch.save's records, but only contiguous tensors of the expected type and shape."""

import io
import zipfile
from typing import Any

import pytest
import torch

from megatron_rasft.tools.conversion.saved_tensors import find_plain_tensor, read_whole


def record_of(value: Any) -> io.BytesIO:
    record = io.BytesIO()
    torch.save(value, record)
    return record


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 5), (1, 4, 1, 6), (7,), (1,)])
def test_a_plain_tensor_is_read_as_torch_reads_it(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    saved = torch.randn(shape).to(dtype)
    record = record_of(saved)
    start = find_plain_tensor(record, dtype, shape)
    assert start is not None
    record.seek(start)
    target = torch.empty_like(saved)
    read_whole(record, target)
    record.seek(0)
    assert torch.equal(target, torch.load(record)) and torch.equal(target, saved)


BASE = torch.arange(24.0).reshape(4, 6)


@pytest.mark.parametrize(
    "value",
    [
        BASE.T,
        BASE[1:],
        BASE[:, :3],
        BASE.double(),
        BASE.to(torch.float8_e4m3fn),
        torch.nn.Parameter(BASE),
        {"weight": BASE},
        [BASE, BASE + 1],
        None,
    ],
    ids=["transposed", "offset", "strided", "another type", "fp8", "parameter", "dict", "two", "none"],
)
def test_anything_else_is_left_to_torch(value: Any) -> None:
    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else (4, 6)
    assert find_plain_tensor(record_of(value), torch.float32, shape) is None


def test_another_shape_is_no_match() -> None:
    assert find_plain_tensor(record_of(BASE), torch.float32, (6, 4)) is None


def test_a_torn_record_is_an_error() -> None:
    whole = record_of(BASE).getvalue()
    with pytest.raises(zipfile.BadZipFile):
        find_plain_tensor(io.BytesIO(whole[:-30]), torch.float32, (4, 6))
    with pytest.raises(EOFError):
        read_whole(io.BytesIO(b"123"), torch.empty(1))
