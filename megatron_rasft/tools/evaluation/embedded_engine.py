"""Samples from a model in this program's own processes, without optimizer or gradients.

Rank 0 calls ``generate``; the other ranks run ``follow``. Every parallel layout of training works, except expert parallelism.
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.utils import unwrap_model
from megatron.training import checkpointing, training

from megatron_rasft.checkpoints import state_files
from megatron_rasft.checkpoints.resume import Resume
from megatron_rasft.errors import CheckpointError
from megatron_rasft.generation.policy_sampler import PolicySampler
from megatron_rasft.machine.megatron_calls import overridden, quiet
from megatron_rasft.model.model_source import chunk_builder, model_tensors
from megatron_rasft.ranks import on_rank_zero
from megatron_rasft.training import startup
from megatron_rasft.types import Request, Response, SamplingParams


class EmbeddedEngine:
    """An ``Engine`` that loads the model. Created on all ranks.

    Args:
        flags: flags of Megatron and of this package, including --hf-model.
        checkpoint: folder of Megatron checkpoints; loads the one of --ckpt-step, or the newest. None loads the weights of
            --hf-model.

    Raises:
        ValueError: a flag cannot be used.
        ModelFolderError: --hf-model cannot be read.
        CheckpointError: the checkpoint belongs to another model, or cannot be loaded.
    """

    def __init__(self, flags: Sequence[str], checkpoint: str | None = None) -> None:
        args, _, folder = startup.parse(flags, needs_data=False)
        if "load" in args.given_flags:
            raise ValueError(
                f"--load {args.load} has no effect here. Give the folder of checkpoints as --checkpoint."
            )
        # Megatron's handler only remembers the signal for the training loop. Without it, SIGTERM ends the evaluation
        args.exit_signal_handler = False
        startup.start(args)
        self._args = args
        with quiet():
            self._model = training.get_model(
                chunk_builder(args, folder), ModelType.encoder_or_decoder, wrap_with_ddp=False
            )
        self._chunks = unwrap_model(self._model)
        for chunk in self._chunks:
            chunk.requires_grad_(False)
        if checkpoint is None:
            model_tensors(self._model, folder).load()
        else:
            self._load_checkpoint(checkpoint)
        self._sampler = PolicySampler(self._chunks, folder.shape.vocab_size)
        self.is_rank_zero = dist.get_rank() == 0

    def _load_checkpoint(self, checkpoint: str) -> None:
        args = self._args
        resume = on_rank_zero(lambda: self._choose(checkpoint))
        flags = {"load": checkpoint, "ckpt_step": resume.step, "no_load_optim": True, "no_load_rng": True}
        try:
            with quiet(), overridden(args, **flags):
                checkpointing.load_checkpoint(self._model, None, None)
        except (AssertionError, RuntimeError, *state_files.LOAD_FAILURES) as error:
            raise CheckpointError(
                f"the checkpoint in {checkpoint} cannot be loaded: {state_files.checkpoint_failure(error)}"
            ) from error

    def _choose(self, checkpoint: str) -> Resume:
        """Chooses the checkpoint on rank 0 for all ranks, because a run may save another checkpoint while the ranks start."""
        resume = Resume.at(checkpoint, self._args.ckpt_step)
        state_files.read_state(resume, state_files.architecture_of(self._args))
        return resume

    @property
    def max_positions(self) -> int:
        """Largest number of tokens of prompt and response together."""
        return self._args.max_position_embeddings

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Response]]:
        """Draws the responses. Called on rank 0, while the other ranks run ``follow``."""
        self._broadcast((list(requests), params))
        return self._sampler.generate(requests, params)

    def follow(self) -> None:
        """Takes part in rank 0's sampling until rank 0 calls ``close``. Called on the other ranks."""
        while (work := self._broadcast(None)) is not None:
            self._sampler.generate(*work)

    def close(self) -> None:
        """Ends ``follow`` on the other ranks. Called on rank 0."""
        self._broadcast(None)

    def _broadcast(self, work: Any) -> Any:
        return on_rank_zero(lambda: work)
