"""The embedded engine of an evaluation: a model that only samples, without optimizer or gradients.

Rank 0 asks, the other ranks ``follow``; every layout that trains also samples, but for expert parallelism.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.utils import unwrap_model
from megatron.training import checkpointing, training

from megatron_rasft.errors import CheckpointError
from megatron_rasft.ranks import on_rank_zero
from megatron_rasft.training import checkpoints, startup
from megatron_rasft.training.generation import PolicySampler
from megatron_rasft.training.hf_weights import HfWeights
from megatron_rasft.training.megatron_calls import overridden, quiet
from megatron_rasft.training.model import build_chunk
from megatron_rasft.training.resume import Resume
from megatron_rasft.types import Request, Response, SamplingParams


class Sampler:
    """An ``Engine`` of evaluation/ on this program's own processes.

    Args:
        flags: Megatron's and this package's own flags; --hf-model is among them.
        checkpoint: folder of Megatron checkpoints, of which --ckpt-step is taken, or the newest; None takes the weights of
            --hf-model.

    Raises:
        ValueError, ModelFolderError, CheckpointError: a flag, or a folder, that no model can be built from.
    """

    def __init__(self, flags: Sequence[str], checkpoint: str | None = None) -> None:
        args, _, folder = startup.parse(flags, needs_data=False)
        if "load" in args.given_flags:
            raise ValueError(
                f"--load {args.load} is not what is sampled from: name the folder with --checkpoint."
            )
        args.exit_signal_handler = False  # nothing here would ask whether SIGTERM came
        startup.start(args)
        self._args = args
        with quiet():
            self._model = training.get_model(
                partial(build_chunk, args), ModelType.encoder_or_decoder, wrap_with_ddp=False
            )
        self._chunks = unwrap_model(self._model)
        for chunk in self._chunks:
            chunk.requires_grad_(False)
        if checkpoint is None:
            HfWeights(self._model, folder).load()
        else:
            self._load_checkpoint(checkpoint)
        self._sampler = PolicySampler(self._chunks, folder.shape.vocab_size)
        self.is_lead = dist.get_rank() == 0

    def _load_checkpoint(self, checkpoint: str) -> None:
        args = self._args
        resume = on_rank_zero(lambda: self._choose(checkpoint))
        flags = {"load": checkpoint, "ckpt_step": resume.step, "no_load_optim": True, "no_load_rng": True}
        try:
            with quiet(), overridden(args, **flags):
                checkpointing.load_checkpoint(self._model, None, None)
        except (AssertionError, RuntimeError, *checkpoints.LOAD_FAILURES) as error:
            raise CheckpointError(
                f"the checkpoint in {checkpoint} cannot be loaded: {checkpoints.checkpoint_failure(error)}"
            ) from error

    def _choose(self, checkpoint: str) -> Resume:
        """Rank 0 chooses for all, because a run may have saved another checkpoint while the ranks started."""
        resume = Resume.at(checkpoint, self._args.ckpt_step)
        checkpoints.read_state(resume, checkpoints.architecture_of(self._args))
        return resume

    @property
    def max_positions(self) -> int:
        """Tokens of prompt and response that the model was made for."""
        return self._args.max_position_embeddings

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Response]]:
        """On rank 0, while the other ranks ``follow``."""
        self._broadcast((list(requests), params))
        return self._sampler.generate(requests, params)

    def follow(self) -> None:
        """Take part in what rank 0 samples, until it closes."""
        while (work := self._broadcast(None)) is not None:
            self._sampler.generate(*work)

    def close(self) -> None:
        """On rank 0: let the other ranks go."""
        self._broadcast(None)

    def _broadcast(self, work: Any) -> Any:
        return on_rank_zero(lambda: work)
