"""The emulated machine raises the errors of a real GPU. Without them a run on it would prove little."""

import sys

import pytest

from tests.emulated_gpu import running

FAULTS = {
    "gpu + cpu": "Expected all tensors to be on the same device",
    "torch.nn.functional.linear(gpu, torch.ones(2, 4))": "Expected all tensors to be on the same device",
    "gpu.numpy()": "can't convert cuda:0 device type tensor to numpy",
    "tex.multi_tensor_l2norm(0, gpu, [[cpu]])": "multi_tensor_l2norm was given a tensor (4,) that is not on the GPU",
    "tex.te_general_grouped_gemm()": "te_general_grouped_gemm is not emulated",
    "torch.cuda.set_device(1)": "invalid device ordinal",
}

PROGRAM = """
import torch, transformer_engine.pytorch, transformer_engine_torch as tex
gpu, cpu = torch.ones(4, device="cuda"), torch.ones(4)
layer = torch.nn.Linear(4, 4).cuda()
layer(gpu).sum().backward()
assert {str(t.device) for t in (gpu, gpu[1:], gpu + 1, cpu.to(gpu), layer.weight.grad)} == {"cuda:0"}
assert {str(t.device) for t in (cpu, gpu.cpu(), gpu.to("cpu"), gpu.tolist() and cpu + 1)} == {"cpu"}
kept = gpu.cpu()
gpu.add_(cpu.cuda())
assert kept.tolist() == [1.0] * 4 and gpu.tolist() == [2.0] * 4
for fault in FAULTS:
    try:
        eval(fault)
    except Exception as error:
        print(fault, "->", error)
"""


@pytest.fixture(scope="module")
def output() -> str:
    program = f"FAULTS = {list(FAULTS)}\n{PROGRAM}"
    done = running.command([sys.executable, "-c", program], "transformer_engine")
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_raises_the_error_of_a_gpu(output: str, fault: str) -> None:
    assert any(line.startswith(f"{fault} ->") and FAULTS[fault] in line for line in output.splitlines()), (
        output
    )
