"""The gradient of the output layer's weight: its sum over chunks, and its transfer to Megatron's data-parallel hook."""

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rasft.machine import wgrad
from megatron_rasft.machine.wgrad import MegatronOutputWeight

ROOT = Path(__file__).resolve().parents[3]


def chunks(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """400 chunks of one token: the gradient of the logits [1, 8], and the hidden state [1, 4]."""
    draw = torch.Generator().manual_seed(0)
    return [
        (torch.randn(1, 8, generator=draw).to(dtype), torch.randn(1, 4, generator=draw).to(dtype))
        for _ in range(400)
    ]


def product(given: list[tuple[Tensor, Tensor]]) -> Tensor:
    return sum((grad.double().t() @ hidden.double() for grad, hidden in given), torch.tensor(0.0))  # type: ignore[return-value]


def output_weight(**attributes: Any) -> MegatronOutputWeight:
    weight = torch.nn.Parameter(torch.zeros(8, 4, dtype=torch.bfloat16))
    for name, value in attributes.items():
        setattr(weight, name, value)
    return MegatronOutputWeight(
        weight=weight, tp_group=None, sums_hidden_grad=False, is_fused="main_grad" in attributes
    )


def add_all(output: MegatronOutputWeight, given: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    for grad, hidden in given:
        output.add_gradient(grad, hidden, is_whole=len(given) == 1)
    return output.finish_gradient()


def test_chunks_of_bf16_are_summed_in_fp32_and_rounded_once() -> None:
    given = chunks(torch.bfloat16)
    gradient = add_all(output_weight(), given)
    assert gradient is not None and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.double(), product(given), rtol=2**-8, atol=1e-4)
    in_bf16 = torch.zeros(8, 4, dtype=torch.bfloat16)
    for grad, hidden in given:
        in_bf16 += grad.t() @ hidden
    assert (in_bf16.double() - product(given)).abs().max() > 0.05, (
        "the data must make a difference between a sum in BF16 and one in fp32"
    )


def test_a_second_micro_batch_starts_from_zero() -> None:
    given, output = chunks(torch.bfloat16), output_weight()
    first = add_all(output, given)
    second = add_all(output, given)
    assert first is not None and second is not None and torch.equal(first, second)


def test_a_single_chunk_is_one_product() -> None:
    given = chunks(torch.bfloat16)[:1]
    gradient = add_all(output_weight(), given)
    assert gradient is not None
    torch.testing.assert_close(gradient.double(), product(given), rtol=2**-8, atol=0)


def test_gradient_fusion_adds_to_main_grad_in_fp32_and_returns_a_placeholder() -> None:
    given, main_grad = chunks(torch.bfloat16), torch.full((8, 4), 3.0)
    output = output_weight(main_grad=main_grad, grad_added_to_main_grad=False)
    stand_in = add_all(output, given)
    torch.testing.assert_close(main_grad.double(), 3.0 + product(given), rtol=1e-5, atol=1e-5)
    weight: Any = output.weight
    assert weight.grad_added_to_main_grad
    # param.grad must not be None under --overlap-grad-reduce: distributed_data_parallel.py
    assert stand_in is not None and stand_in.shape == weight.shape and stand_in.dtype == weight.dtype


def test_a_tied_weight_gets_its_gradient_for_autograd_from_the_embedding() -> None:
    main_grad = torch.zeros(8, 4)
    output = output_weight(main_grad=main_grad, grad_added_to_main_grad=False, zero_out_wgrad=True)
    assert add_all(output, chunks(torch.bfloat16)) is None
    assert (main_grad != 0).all()


def test_a_bf16_main_grad_gets_the_fp32_sum_from_the_hook() -> None:
    given, main_grad = chunks(torch.bfloat16), torch.zeros(8, 4, dtype=torch.bfloat16)
    output = output_weight(main_grad=main_grad, grad_added_to_main_grad=False)
    gradient = add_all(output, given)
    assert gradient is not None and (main_grad == 0).all()
    assert not output.weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    torch.testing.assert_close(gradient.double(), product(given), rtol=2**-8, atol=1e-4)


def test_megatron_finds_the_fused_weight_gradient_without_apex() -> None:
    program = (
        "from megatron_rasft.machine import cpu_backend; cpu_backend.enable();"
        "from megatron.core.tensor_parallel import layers; print(layers._grad_accum_fusion_available)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == "True"


def test_an_installed_apex_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    apex = types.ModuleType("fused_weight_gradient_mlp_cuda")
    monkeypatch.setitem(sys.modules, apex.__name__, apex)
    wgrad.register()
    assert sys.modules[apex.__name__] is apex


def test_transformer_engine_computes_the_product_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def general_gemm(a: Tensor, b: Tensor, **options: Any) -> None:
        calls.append(options)
        options["out"].add_(b.t().to(options["out"].dtype) @ a.to(options["out"].dtype))

    extensions = types.ModuleType("transformer_engine.pytorch.cpp_extensions")
    extensions.general_gemm = general_gemm  # type: ignore[attr-defined]
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, extensions.__name__, extensions)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    (grad, hidden), main_grad = chunks(torch.bfloat16)[0], torch.ones(8, 4)
    wgrad.add_product(hidden, grad, main_grad)
    torch.testing.assert_close(main_grad.double(), 1.0 + product([(grad, hidden)]), rtol=1e-6, atol=1e-6)
    assert calls == [
        {
            "out": main_grad,
            "out_dtype": torch.float32,
            "layout": "NT",
            "grad": True,
            "accumulate": True,
        }
    ]
