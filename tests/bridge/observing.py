"""Records what a rank of a bridged run computes, exports and would send to servers. Ranks call ``record`` before the program."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOKENS = [3, 11, 4, 10, 7, 1, 9, 12, 5, 2, 8, 6, 31, 20, 14, 3, 11, 4, 10, 7]
"""The tokens whose logits are recorded."""


def record(folder: Path) -> None:
    """Makes the export of a run also write the trainer's logits of ``TOKENS``, and all tensors of a weight sync.

    The files logits.pt and sync.pt are written by the rank that holds the output layer, and by the sender.
    """
    from megatron_rasft.training.trainer import Trainer

    export = Trainer.export

    def observed(self: Trainer, path: str, facts: dict[str, str] | None = None) -> None:
        export(self, path, facts)
        with self.parameters_gathered():
            _write_logits(self.chunks, folder / "logits.pt")
            _write_sync(self, folder / "sync.pt")

    Trainer.export = observed  # type: ignore[method-assign]


def _write_logits(chunks: Sequence[Any], path: Path) -> None:
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    (chunk,) = unwrap_model(chunks)
    tokens = torch.tensor([TOKENS], device="cuda")
    positions = torch.arange(len(TOKENS), device="cuda")[None]
    if not chunk.pre_process:
        hidden = torch.empty(
            len(TOKENS), 1, chunk.config.hidden_size, dtype=chunk.config.params_dtype, device="cuda"
        )
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        chunk.set_input_tensor(hidden)
    chunk.eval()
    with torch.no_grad():
        output = chunk(tokens, positions, None, runtime_gather_output=True)
    if chunk.post_process:
        torch.save(output.float().cpu(), path)
    else:
        dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())


def _write_sync(trainer: Any, path: Path) -> None:
    """Runs the stream of a weight sync, with a dictionary in the place of servers."""
    import torch

    from megatron_rasft.ranks import patient_group
    from megatron_rasft.sync.buckets import Bucket
    from megatron_rasft.sync.streaming import Outcome, StageStream
    from megatron_rasft.sync.wire_format import WireFormat

    assert (trainer.tensors.num_stages, trainer.tensors.takes_part) == (1, True)
    stream = StageStream(
        trainer.tensors,
        ranks=patient_group(),
        device=trainer.sampler.device,
        wire_format=WireFormat(trainer.args.params_dtype),
        bucket_bytes=2**16,
    )
    received: dict[str, torch.Tensor] = {}

    def send(bucket: Bucket, memory: torch.Tensor) -> None:
        received.update({name: view.clone().cpu() for name, view in bucket.views(memory).items()})

    outcome = Outcome()
    stream.run(outcome, None, stream.take_arena() if stream.is_sender else None, send)
    assert not outcome.reason
    if stream.is_sender:
        assert outcome.num_buckets > 1
        torch.save(received, path)
