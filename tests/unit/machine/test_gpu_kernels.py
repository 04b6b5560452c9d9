"""Start-up with a working, a missing and a broken Transformer Engine."""

import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rasft.errors import RasftError
from megatron_rasft.machine.gpu_kernels import (
    check_transformer_engine,
    report_missing_transformer_engine,
)


def on_gpu(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> list[str]:
    """Pretends that there is a GPU and that imports raise ``error``; returns the list of imported modules."""
    imported: list[str] = []

    def import_module(name: str) -> None:
        imported.append(name)
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib, "import_module", import_module)
    return imported


def test_transformer_engine_is_not_imported_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = on_gpu(monkeypatch, ImportError("broken"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_transformer_engine()
    assert imported == []


@pytest.mark.parametrize(
    "error", [None, ModuleNotFoundError("missing", name="transformer_engine")], ids=["works", "missing"]
)
def test_a_working_or_missing_transformer_engine_passes(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    imported = on_gpu(monkeypatch, error)
    check_transformer_engine()
    assert imported == ["transformer_engine.pytorch"]


@pytest.mark.parametrize(
    "error",
    [
        ImportError("undefined symbol: _ZN3c10\nmore lines"),
        OSError("libcudnn.so.9: no such file"),
        ModuleNotFoundError("No module named 'onnx'", name="onnx"),
    ],
)
def test_a_broken_transformer_engine_is_refused_with_the_reason_and_the_command(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    on_gpu(monkeypatch, error)
    with pytest.raises(RasftError) as refusal:
        check_transformer_engine()
    message = str(refusal.value)
    assert str(error).splitlines()[0] in message and "more lines" not in message
    assert torch.__version__ in message and "megatron-rasft[te]" in message
    assert refusal.value.__cause__ is error


@pytest.mark.parametrize(
    ("rank", "backend", "is_installed", "is_reported"),
    [
        (0, "nccl", False, True),
        (1, "nccl", False, False),
        (0, "gloo", False, False),
        (0, "nccl", True, False),
    ],
)
def test_rank_0_of_a_run_on_gpus_reports_a_missing_transformer_engine(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    rank: int,
    backend: str,
    is_installed: bool,
    is_reported: bool,
) -> None:
    def find_spec(name: str) -> Any:
        assert name == "transformer_engine"
        return object() if is_installed else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    report_missing_transformer_engine(SimpleNamespace(rank=rank, distributed_backend=backend))
    assert ("megatron-rasft[te]" in capsys.readouterr().err) == is_reported
