"""Knobs of ``megatron_rasft/rollout``: how the policy is sampled and where the samples are kept."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(kw_only=True)
class RolloutConfig:
    """Sampling from the current policy."""

    rollout_engine: Literal["embedded", "replay"] = "embedded"
    """embedded: sample from the training model itself; replay: take the responses of --rollout-replay."""

    rollout_num_samples: int = 4
    """Responses per sampled problem (K), >= 1. To train without rollouts use --curriculum-mode off."""

    rollout_temperature: float = 1.0
    """Sampling temperature, >= 0; 0 takes the most likely token."""

    rollout_top_p: float = 1.0
    """Sample from the smallest set of tokens whose probability reaches this, in (0, 1]."""

    rollout_repetition_penalty: float = 1.0
    """Penalty on tokens already seen, > 0; 1 is off. The published script uses 1.1."""

    rollout_max_new_tokens: int = 1024
    """Longest response, in tokens, >= 1. Prompt and response together must fit --seq-length."""

    rollout_batch_size: int = 64
    """Sequences decoded at once on one replica, >= 1. More is faster until memory ends."""

    rollout_seed: int = 1234
    """Seed of sampling, >= 0. Each sample's draws depend on it, the problem, the weights' step and its number only."""

    rollout_store: str | None = None
    """File that every rollout is appended to (.jsonl). Unset: rollouts.jsonl in --save; without --save none is kept."""

    rollout_replay: list[str] = field(default_factory=list)
    """Rollout stores that --rollout-engine replay takes its responses from."""

    def __post_init__(self) -> None:
        for flag, value in (
            ("--rollout-num-samples", self.rollout_num_samples),
            ("--rollout-max-new-tokens", self.rollout_max_new_tokens),
            ("--rollout-batch-size", self.rollout_batch_size),
        ):
            if value < 1:
                raise ValueError(
                    f"{flag} must be >= 1, got {value}. To train without rollouts use --curriculum-mode off."
                )
        if self.rollout_temperature < 0:
            raise ValueError(
                f"--rollout-temperature must be >= 0, got {self.rollout_temperature}. Use 1 to sample as is."
            )
        if not 0 < self.rollout_top_p <= 1:
            raise ValueError(
                f"--rollout-top-p must be in (0, 1], got {self.rollout_top_p}. Use 1 to keep every token."
            )
        if self.rollout_repetition_penalty <= 0:
            raise ValueError(
                f"--rollout-repetition-penalty must be > 0, got {self.rollout_repetition_penalty}. Use 1 for none."
            )
        if self.rollout_seed < 0:
            raise ValueError(
                f"--rollout-seed must be >= 0, got {self.rollout_seed}. Use any other whole number."
            )
        if self.rollout_engine == "replay" and not self.rollout_replay:
            raise ValueError(
                "--rollout-engine replay needs --rollout-replay FILE [FILE...]: the stores to take from."
            )
