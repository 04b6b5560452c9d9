import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_kernels_that_are_installed_are_left_alone(tmp_path: Path) -> None:
    """A login node may have Transformer Engine: Megatron would call its kernels wherever it imports."""
    for name in ("transformer_engine", "apex"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('needs a GPU')")
    program = (
        "from megatron_rasft.training import cpu_backend\n"
        "assert cpu_backend.enable() and cpu_backend.use_cpu_fused_adam()\n"
        "import megatron.core.optimizer.clip_grads, megatron.core.models.gpt.gpt_layer_specs as specs\n"
        "assert not specs.HAVE_TE\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[3]}:{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
