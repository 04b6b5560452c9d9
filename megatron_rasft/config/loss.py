"""The choice of the objective, and how its log-probabilities are computed. The flags of each objective are in its own file."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_rasft.flags import FlagSection, NonNegativeInt, OneOf
from megatron_rasft.objective.families import OBJECTIVES, describe_objectives

LOGITS_BYTES = 3 << 30
"""Maximum bytes of logits that the fused kernels keep at a time if --objective-logprob-chunk-tokens is unset. With a
full-vocabulary KL the reference's logits take the same again. All logits of a micro-batch of 8,192 tokens fit for a vocabulary
of up to 196,000 per rank. They are then not computed twice."""

PLAIN_CHUNK_TOKENS = 1024
"""Number of tokens whose logits the plain operators keep at a time if --objective-logprob-chunk-tokens is unset."""


@dataclass(kw_only=True)
class LossConfig(FlagSection):
    """The objective, and the computation of log-probabilities."""

    objective: Annotated[str, OneOf(tuple(OBJECTIVES), meanings=describe_objectives())] = "rasft"
    """The loss that is minimised: a masked sum over response tokens, divided once by their number in the global batch; for rasft,
    --weighting-normalization sets which tokens are counted."""

    objective_logprob_chunk_tokens: NonNegativeInt | None = None
    """Tokens per vocabulary projection: logits exist for this many tokens at a time and are recomputed in the backward pass.
    A smaller value saves memory; 0 projects all tokens at once, which saves the recomputation. Unset: as many as fit 3 GiB of
    logits on a GPU, 1024 on a CPU."""

    objective_logprob_kernels: Literal["auto", "fused", "plain"] = "auto"
    """Implementation of log-probabilities and KL. fused: Triton kernels, 6 to 10 bytes of memory traffic per logit; plain: torch
    operators, 48 bytes or more; auto: fused on a GPU, plain on a CPU."""


def fused_chunk_tokens(num_tokens: int, bytes_per_token: int) -> int:
    """Returns the number of tokens whose logits are kept at a time: equal parts of at most ``LOGITS_BYTES``; 0 for all."""
    num_chunks = -(-num_tokens * bytes_per_token // LOGITS_BYTES)
    return 0 if num_chunks <= 1 else -(-num_tokens // num_chunks)
