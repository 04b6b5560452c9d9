"""Megatron's calls of torch.cuda on a CPU, and the optimizer that takes the place of FusedAdam."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_rasft.machine.cpu_backend import CpuFusedAdam

ROOT = Path(__file__).parents[3]
needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


def run(program: str, *folders: Path) -> None:
    """Runs a program in a separate process, because ``enable`` changes torch permanently."""
    environment = os.environ | {"PYTHONPATH": ":".join(map(str, (ROOT, *folders)))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@needs_cpu
def test_installed_gpu_kernels_are_not_imported(tmp_path: Path) -> None:
    """A login node may have Transformer Engine. Megatron would use its kernels, because it can be imported."""
    for name in ("transformer_engine", "apex"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('needs a GPU')")
    run(
        "from megatron_rasft.machine import cpu_backend\n"
        "assert cpu_backend.enable() and cpu_backend.use_cpu_fused_adam()\n"
        "import megatron.core.optimizer.clip_grads, megatron.core.models.gpt.gpt_layer_specs as specs\n"
        "assert not specs.HAVE_TE\n",
        tmp_path,
    )


@needs_cpu
def test_cuda_means_the_cpu() -> None:
    run(
        "import torch\n"
        "from megatron_rasft.machine import cpu_backend\n"
        "assert cpu_backend.enable() and cpu_backend.enable(), 'a second call changes nothing'\n"
        "x = torch.ones(3, device='cuda', pin_memory=True)\n"
        "assert x.device.type == 'cpu' and x.cuda() is x and x.to('cuda:0') is x\n"
        "assert torch.zeros(2, device=torch.device('cuda', 1)).device.type == 'cpu'\n"
        "assert x.type() == 'torch.cuda.FloatTensor', 'the type that Megatron tests for'\n"
        "assert x.type(torch.float64).dtype == torch.float64\n"
        "torch.cuda.manual_seed(5)\n"
        "state = torch.cuda.get_rng_state()\n"
        "first = torch.rand(4, device='cuda')\n"
        "torch.cuda.set_rng_state(state)\n"
        "assert torch.equal(torch.rand(4, device='cuda'), first)\n"
        "with torch.cuda.stream(torch.cuda.Stream()) as _:\n"
        "    event = torch.cuda.Event(enable_timing=True)\n"
        "event.record(); event.synchronize(); assert event.query()\n"
        "torch.cuda.current_stream().wait_stream(torch.cuda.Stream())\n"
        "assert torch.cuda.device_count() == 1 and torch.cuda.memory_allocated() == 0\n"
    )


@needs_cpu
def test_program_does_not_import_the_compiler() -> None:
    """The import takes 2.5 seconds of CPU time in each process of a run."""
    run(
        "import sys, torch, pretrain_rasft\n"
        "assert 'torch._dynamo' not in sys.modules and 'torch._inductor.compile_fx' not in sys.modules\n"
        "assert [torch.compile(abs)(-1), torch.compile(dynamic=True)(abs)(-1)] == [1, 1]\n"
    )


def adam_step(
    weight: torch.Tensor, grads: list[torch.Tensor], decay: float, is_decoupled: bool
) -> torch.Tensor:
    """Adam (arXiv 1412.6980) or AdamW (arXiv 1711.05101) in fp64, with lr 0.1, betas 0.8 and 0.9, eps 1e-6."""
    weight = weight.double()
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, grad in enumerate(grads, 1):
        grad = grad.double()
        if is_decoupled:
            weight = weight - 0.1 * decay * weight
        else:
            grad = grad + decay * weight
        mean = 0.8 * mean + 0.2 * grad
        square = 0.9 * square + 0.1 * grad**2
        corrected = (square / (1 - 0.9**step)).sqrt() + 1e-6
        weight = weight - 0.1 * mean / (1 - 0.8**step) / corrected
    return weight


@pytest.mark.parametrize("is_decoupled", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_cpu_fused_adam_follows_the_formula(is_decoupled: bool, decay: float) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, generator=draw))
    grads = [torch.randn(5, generator=draw) for _ in range(3)]
    expected = adam_step(weight.detach(), grads, decay, is_decoupled)
    optimizer = CpuFusedAdam(
        [weight], lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=decay, adam_w_mode=is_decoupled
    )
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_cpu_fused_adam_counts_steps_per_group_like_fused_adam() -> None:
    weight, idle = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = CpuFusedAdam([{"params": [weight]}, {"params": [idle]}])
    for _ in range(2):
        weight.grad = torch.ones(2)
        optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [2, 2]
    assert sorted(optimizer.state[weight]) == ["exp_avg", "exp_avg_sq"]
    assert idle not in optimizer.state and idle.tolist() == [1.0, 1.0]


@needs_cpu
def test_rotary_positions_of_a_pack_are_those_of_each_sequence() -> None:
    run(
        "import torch\n"
        "from types import SimpleNamespace\n"
        "from megatron_rasft.machine import cpu_backend\n"
        "assert cpu_backend.enable()\n"
        "from megatron.core.models.common.embeddings import rope_utils\n"
        "heads, longest = torch.randn(12, 2, 8), torch.randn(9, 1, 1, 8)\n"
        "for size, freqs in ((1, longest), (1, longest[:8]), (2, longest)):\n"
        "    group = SimpleNamespace(size=lambda: size, rank=lambda: size - 1)\n"
        "    bounds = size * torch.tensor([0, 4, 4, 6, 8])\n"
        "    found = rope_utils._apply_rotary_pos_emb_thd(heads[:8], bounds, freqs, cp_group=group)\n"
        "    for begin, end in ((0, 4), (4, 6), (6, 8)):\n"
        "        own = freqs[:4]\n"
        "        if size == 2:\n"
        "            half = (end - begin) // 2\n"
        "            own = freqs[half:3 * half]\n"
        "        alone = rope_utils._apply_rotary_pos_emb_bshd(heads[begin:end, None], own[:end - begin])[:, 0]\n"
        "        assert torch.equal(found[begin:end], alone), (size, begin)\n"
    )
