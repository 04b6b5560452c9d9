"""Counts memory traffic and kernels of the log-probabilities, forward and backward, and measures their time on a GPU.

python benchmarks/logprobs.py [--tokens 8192] [--no-time]

Bytes and kernels are counted on the meta device from the arguments of every torch operator that runs, so the figures are
the same on every machine: each operator reads its inputs once and writes its outputs once, without caches. Operands of matrix
products are counted separately (`matmul`), because a fused cross-entropy has the same products. The counts of
the Triton kernels are compared with the loads and stores that they run in tests/unit/objective/test_fused_logprobs.py.

On a GPU each implementation is timed, as are the fused cross-entropies of Megatron and Transformer Engine, from hidden states to
the gradients of hidden states and weight.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_rasft.machine import cpu_backend

cpu_backend.enable()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.traffic import Traffic  # noqa: E402
from megatron_rasft.config.loss import fused_chunk_tokens  # noqa: E402
from megatron_rasft.machine.wgrad import MegatronOutputWeight  # noqa: E402
from megatron_rasft.objective.fused_logprobs import ReferenceLogits, fused_logprobs  # noqa: E402
from megatron_rasft.objective.logprobs import chunked_logprobs, chunked_logprobs_and_kl  # noqa: E402
from megatron_rasft.types import KLDirection  # noqa: E402

MAX_BYTES_PER_LOGIT = 12
"""Bar for forward and backward together with BF16 logits, without the matrix products."""

PLAIN_CHUNK = 1024
NO_FUSION = ", gradient left to autograd"
"""Suffix for the names of implementations without gradient accumulation fusion. With several chunks these make an additional
pass over the weight's fp32 gradient, 6 bytes per weight, to which the bar on logits does not apply."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's vocabulary projection on one rank."""

    hidden_size: int
    vocab_size: int


SHAPES = {
    "1.5B": Shape(hidden_size=1536, vocab_size=151936),
    "8B": Shape(hidden_size=4096, vocab_size=128256),
    "70B TP8": Shape(hidden_size=8192, vocab_size=128256 // 8),
    "tiny": Shape(hidden_size=32, vocab_size=256),
}


class Linear(torch.autograd.Function):
    """The vocabulary projection as Megatron's layer computes it without gradient accumulation fusion."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(hidden, weight)
        return hidden @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].t() @ hidden


class Inputs:
    """Hidden states, weight and labels of a micro-batch in BF16."""

    def __init__(self, shape: Shape, num_tokens: int, direction: KLDirection | None, device: str) -> None:
        def bf16(*size: int) -> Tensor:
            return torch.randn(*size, dtype=torch.bfloat16, device=device) * 0.02

        self.vocab_size, self.direction = shape.vocab_size, direction
        self.hidden = bf16(num_tokens, shape.hidden_size).requires_grad_()
        self.weight = bf16(shape.vocab_size, shape.hidden_size).requires_grad_()
        weight: Any = self.weight
        weight.main_grad = torch.zeros(shape.vocab_size, shape.hidden_size, device=device)
        weight.grad_added_to_main_grad = False
        self.labels = torch.randint(shape.vocab_size, (num_tokens,), device=device)
        if direction is not None:
            self.ref_hidden = bf16(num_tokens, shape.hidden_size)
            self.ref_weight = bf16(shape.vocab_size, shape.hidden_size)


def plain(given: Inputs, chunk_tokens: int) -> None:
    """Computes forward and backward with plain torch operators."""
    if given.direction is None:
        logprobs = chunked_logprobs(
            given.hidden,
            lambda hidden: Linear.apply(hidden, given.weight),
            given.labels,
            None,
            given.vocab_size,
            chunk_tokens,
        )
        logprobs.sum().backward()
        return
    logprobs, kl = chunked_logprobs_and_kl(
        given.hidden,
        lambda hidden: Linear.apply(hidden, given.weight),
        given.ref_hidden,
        lambda hidden: hidden @ given.ref_weight.t(),
        given.labels,
        None,
        given.vocab_size,
        chunk_tokens,
        given.direction,
    )
    torch.autograd.backward([logprobs.sum(), kl.sum()])


def fused(given: Inputs, chunk_tokens: int, *, adds_to_main_grad: bool = True) -> None:
    """Computes forward and backward with the fused kernels."""
    output = MegatronOutputWeight(
        weight=given.weight, tp_group=None, sums_hidden_grad=False, is_fused=adds_to_main_grad
    )
    reference = None
    if given.direction is not None:
        reference = ReferenceLogits(
            hidden=given.ref_hidden, weight=given.ref_weight, direction=given.direction
        )
    logprobs, kl = fused_logprobs(
        given.hidden, output, given.labels, given.vocab_size, chunk_tokens, reference
    )
    torch.autograd.backward([x.sum() for x in (logprobs, kl) if x is not None])


def ways(shape: Shape, num_tokens: int, direction: KLDirection | None) -> dict[str, Callable[[Inputs], None]]:
    """Name of each implementation -> its function. All compute the same values."""
    default = fused_chunk_tokens(num_tokens, 2 * shape.vocab_size)
    small = max(1, min(PLAIN_CHUNK, num_tokens // 2))
    return {
        f"plain, chunks of {small}": lambda given: plain(given, small),
        "plain, all at once": lambda given: plain(given, 0),
        f"fused, {default or 'all at once'}": lambda given: fused(given, default),
        f"fused, {default or 'all at once'}{NO_FUSION}": lambda given: fused(
            given, default, adds_to_main_grad=False
        ),
        f"fused, chunks of {small}": lambda given: fused(given, small),
        f"fused, chunks of {small}{NO_FUSION}": lambda given: fused(given, small, adds_to_main_grad=False),
    }


def count(shape: Shape, num_tokens: int, direction: KLDirection | None) -> list[dict[str, Any]]:
    """One row per implementation: kernels, bytes per logit, and bytes of the matrix products."""
    rows = []
    for way, run in ways(shape, num_tokens, direction).items():
        given = Inputs(shape, num_tokens, direction, "meta")
        with Traffic() as traffic:
            run(given)
        num_logits = num_tokens * shape.vocab_size
        rows.append(
            {
                "kl": direction,
                "way": way,
                "kernels": traffic.num_kernels,
                "bytes_per_logit": round(traffic.num_bytes / num_logits, 2),
                "matmul_bytes_per_logit": round(traffic.matmul_bytes / num_logits, 2),
                "matmul_tflop": round(traffic.matmul_flops / 1e12, 3),
            }
        )
    return rows


def is_under_bar(row: dict[str, Any]) -> bool:
    """Whether the bar applies: to every fused implementation except chunks without gradient accumulation fusion."""
    way: str = row["way"]
    return way.startswith("fused") and not ("chunks" in way and way.endswith(NO_FUSION))


def cross_entropies(given: Inputs) -> dict[str, Callable[[Inputs], None]]:
    """Fused cross-entropy of Megatron and Transformer Engine, if they can be imported, for all tokens at once."""
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    group = parallel_state.get_tensor_model_parallel_group()

    def megatron(given: Inputs) -> None:
        logits = Linear.apply(given.hidden, given.weight)[:, None]
        fused_vocab_parallel_cross_entropy(logits, given.labels[:, None], group).sum().backward()

    found: dict[str, Callable[[Inputs], None]] = {"Megatron's fused cross-entropy": megatron}
    try:
        from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy
    except ImportError:
        return found

    def transformer_engine(given: Inputs) -> None:
        logits = Linear.apply(given.hidden, given.weight)[:, None]
        parallel_cross_entropy(
            logits, given.labels[:, None], dist_process_group=None, overwrite_input=True
        ).sum().backward()

    return {**found, "Transformer Engine's cross-entropy": transformer_engine}


def time_on_gpu(shape: Shape, num_tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    """Measures median milliseconds and peak GiB above the inputs of each implementation, without KL."""
    given = Inputs(shape, num_tokens, None, "cuda")
    measured = {}
    for way, run in {**ways(shape, num_tokens, None), **cross_entropies(given)}.items():
        times = []
        for _ in range(repeats + 2):
            given.hidden.grad = given.weight.grad = None
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(given)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        measured[way] = {"ms": round(statistics.median(times[2:]), 3), "peak_gib": round(peak, 2)}
    return measured


def start_megatron() -> None:
    """Initializes process groups of one process, which the cross-entropies need."""
    from megatron.core import parallel_state

    from megatron_rasft.training.startup import stand_in_for_launcher

    stand_in_for_launcher()
    torch.distributed.init_process_group("nccl")
    parallel_state.initialize_model_parallel()


def main() -> int:
    """Counts and prints a line per implementation, measures times if there is a GPU, and prints all figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=list(SHAPES),
        default=["1.5B", "8B", "70B TP8"],
        help="vocabulary projections on one rank; tiny is for a quick test",
    )
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a micro-batch")
    parser.add_argument("--repeats", type=int, default=10, help="timed repetitions of each way")
    parser.add_argument("--no-time", action="store_true", help="count only, without measuring times on a GPU")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    report: dict[str, Any] = {"tokens": options.tokens, "counted": {}, "timed": {}}
    shapes = {name: SHAPES[name] for name in options.shapes}
    for name, shape in shapes.items():
        rows = [
            row
            for kl in (None, "forward", "reverse")
            for row in count(shape, options.tokens, kl)  # type: ignore[arg-type]
        ]
        report["counted"][name] = rows
        for row in rows:
            print(
                f"{name:8s} {row['kl'] or 'no KL':8s} {row['way']:62s} {row['kernels']:5d} kernels "
                f"{row['bytes_per_logit']:7.2f} B a logit  + matmul {row['matmul_bytes_per_logit']:6.2f} B, "
                f"{row['matmul_tflop']:.2f} TFLOP"
            )
    worst = report["max_bytes_per_logit"] = max(
        row["bytes_per_logit"] for rows in report["counted"].values() for row in rows if is_under_bar(row)
    )
    print(f"fused: at most {worst} bytes a logit; the bar is {MAX_BYTES_PER_LOGIT}")
    if torch.cuda.is_available() and not options.no_time:
        start_megatron()
        for name, shape in shapes.items():
            report["timed"][name] = time_on_gpu(shape, options.tokens, options.repeats)
            for way, figures in report["timed"][name].items():
                print(f"{name:8s} {way:62s} {figures['ms']:8.3f} ms  {figures['peak_gib']:6.2f} GiB")
        torch.distributed.destroy_process_group()
    print(json.dumps(report), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(report), encoding="utf-8")
    return 0 if worst <= MAX_BYTES_PER_LOGIT else 1


if __name__ == "__main__":
    sys.exit(main())
