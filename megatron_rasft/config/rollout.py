"""Knobs of ``megatron_rasft/rollout``: how the policy is sampled and where the samples are kept."""

from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit


@dataclass(kw_only=True)
class RolloutConfig:
    """Sampling from the current policy."""

    rollout_engine: Literal["embedded", "sglang", "replay"] = "embedded"
    """embedded: sample from the training model itself; sglang: ask the servers of --rollout-urls and
    --rollout-server-file; replay: take the responses of --rollout-replay."""

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

    rollout_batch_size: int | None = None
    """Sequences that the embedded engine decodes at once on one replica, >= 1. Unset: on a GPU the largest power of
    two up to 512 that fits the free memory, on a CPU 64. The samples do not depend on it but for rounding."""

    rollout_seed: int = 1234
    """Seed of sampling, >= 0. Each sample's draws depend on it, the problem, the weights' step and its number only."""

    rollout_store: str | None = None
    """File that every rollout is appended to (.jsonl). Unset: rollouts.jsonl in --save; without --save none is kept."""

    rollout_replay: list[str] = field(default_factory=list)
    """Rollout stores that --rollout-engine replay takes its responses from."""

    rollout_urls: list[str] = field(default_factory=list)
    """Addresses of SGLang servers, http://host:port each."""

    rollout_server_file: str | None = None
    """File that tools/serve_rollouts.py enters its servers in; read at every refresh, so servers may come and go."""

    rollout_api_key_env: str | None = None
    """Environment variable that holds the servers' --api-key. The key itself is never a flag: flags are logged."""

    rollout_admin_api_key_env: str | None = None
    """Environment variable that holds their --admin-api-key, where they have one."""

    rollout_concurrency: int = 256
    """Requests in flight at one server, >= 1, and never more than it runs at once; one request is one sample."""

    rollout_deadline_s: float = 600.0
    """Longest time a server may take for one sample, seconds, > 0; then it counts as hung and others are asked."""

    rollout_watch_s: float = 60.0
    """Longest time a server may take to answer a sign of life while it works, seconds, > 0; then it counts as hung."""

    rollout_attempts: int = 3
    """Times a sample is tried before it is given up, >= 1; each time elsewhere if there is a choice."""

    rollout_wait_s: float = 600.0
    """Time to wait for the first server, seconds, >= 0."""

    rollout_without_servers: Literal["error", "demonstrations"] = "error"
    """What a refresh does when no server answers. error: end the run, saying so; demonstrations: train on these alone."""

    rollout_max_logprob_gap: float | None = 0.1
    """Largest mean difference between a server's log-probabilities and the trainer's after a sync, in nats a token on a
    few demonstrations, > 0; a server beyond it is left out. bf16 kernels differ by 0.01 to 0.03."""

    rollout_lag: int = 0
    """0: steps wait for rollouts of the current weights; 1: the rollouts of the next refresh are made while the
    steps of this one run, so they are one refresh old."""

    def __post_init__(self) -> None:
        for flag, value in (
            ("--rollout-num-samples", self.rollout_num_samples),
            ("--rollout-max-new-tokens", self.rollout_max_new_tokens),
            ("--rollout-batch-size", 1 if self.rollout_batch_size is None else self.rollout_batch_size),
            ("--rollout-concurrency", self.rollout_concurrency),
            ("--rollout-attempts", self.rollout_attempts),
        ):
            if value < 1:
                raise ValueError(
                    f"{flag} must be >= 1, got {value}. To train without rollouts use --curriculum-mode off."
                )
        for flag, seconds in (
            ("--rollout-deadline-s", self.rollout_deadline_s),
            ("--rollout-watch-s", self.rollout_watch_s),
        ):
            if seconds <= 0:
                raise ValueError(
                    f"{flag} must be > 0, got {seconds}. A server that hangs is only noticed by it."
                )
        if self.rollout_wait_s < 0:
            raise ValueError(
                f"--rollout-wait-s must be >= 0, got {self.rollout_wait_s}. Use 0 not to wait at all."
            )
        if self.rollout_max_logprob_gap is not None and self.rollout_max_logprob_gap <= 0:
            raise ValueError(
                f"--rollout-max-logprob-gap must be > 0, got {self.rollout_max_logprob_gap}: no two programs agree in every "
                "bit. Use inf to accept every server."
            )
        if self.rollout_lag not in (0, 1):
            raise ValueError(
                f"--rollout-lag must be 0 or 1, got {self.rollout_lag}. Use 0 for rollouts of the current weights."
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
        for url in self.rollout_urls:
            check_address(url, "--rollout-urls")
        has_servers = bool(self.rollout_urls) or self.rollout_server_file is not None
        if self.rollout_engine == "sglang" and not has_servers:
            raise ValueError(
                "--rollout-engine sglang needs servers: --rollout-urls http://HOST:PORT [...], or --rollout-server-file "
                "FILE as tools/serve_rollouts.py writes it."
            )
        if self.rollout_engine != "sglang" and self.rollout_lag:
            raise ValueError(
                f"--rollout-lag 1 needs --rollout-engine sglang, got {self.rollout_engine}: only servers sample while "
                "the trainer steps."
            )
        if self.rollout_engine == "replay" and not self.rollout_replay:
            raise ValueError(
                "--rollout-engine replay needs --rollout-replay FILE [FILE...]: the stores to take from."
            )
        if self.rollout_replay and self.rollout_engine != "replay":
            raise ValueError(
                f"--rollout-replay is for --rollout-engine replay, got {self.rollout_engine}, which samples anew. Choose that "
                "engine, or leave the stores out."
            )


def check_address(text: str, where: str) -> str:
    """A server's address in the one spelling that is used from here on, so that none is taken for two servers.

    Raises:
        ValueError: ``text`` is no ``http://host:port``; the message begins with ``where``.
    """
    if "@" in text:
        raise ValueError(
            f"{where}: an address with a user or password in it would show them in every log, and would be sent in the place of "
            "the bearer key. Write it as http://host:port, and name the key with --rollout-api-key-env."
        )
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
        is_address = parts.scheme in ("http", "https") and bool(host.encode("idna")) and port is not None
        is_address &= parts.path in ("", "/") and not parts.query and not parts.fragment
    except ValueError:  # UnicodeError too: a host name that no resolver takes
        is_address = False
    if not is_address or not text.isprintable() or " " in text:
        raise ValueError(f"{where}: {text!r} is no address of a server. Write it as http://host:port.")
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port}"
