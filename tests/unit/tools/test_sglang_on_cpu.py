"""The launcher only replaces the modules that the environment lacks; real servers are started in tests/functional."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[3] / "tools"

SCHEMA = '"torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"'


@pytest.mark.parametrize(
    "torchvision",
    [
        f"torch.library.define({SCHEMA})",  # fits its torch, and defines the operators like torchvision's compiled part
        'torch.library.register_fake("torchvision::nms")(lambda *given: None)',  # without a compiled part
    ],
)
def test_torchvision_imports_with_its_operators_and_without(tmp_path: Path, torchvision: str) -> None:
    (tmp_path / "torchvision.py").write_text(f"import torch\n{torchvision}\n")
    code = (
        f"import sys; sys.path[:0] = [{str(TOOLS)!r}, {str(tmp_path)!r}]; import sglang_on_cpu, torchvision"
    )
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
