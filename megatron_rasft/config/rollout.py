"""Flags of ``megatron_rasft/rollout``: how the policy is sampled, and where the rollouts are stored."""

from dataclasses import dataclass, field
from typing import Annotated, Literal
from urllib.parse import urlsplit

from megatron_rasft.flags import (
    FlagSection,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    flag_name,
)

_MIN_UNGUIDED = 2
"""Smallest number of unguided responses to a problem with guided ones. ``objective.guidance.gain`` compares the two kinds."""


@dataclass(kw_only=True)
class RolloutConfig(FlagSection):
    """Sampling from the current policy."""

    rollout_engine: Literal["embedded", "sglang", "replay"] = "embedded"
    """embedded: the trainer samples from its own weights; sglang: the servers of --rollout-urls and --rollout-server-file sample;
    replay: the responses of --rollout-replay are used."""

    rollout_num_samples: Annotated[
        int, Range(at_least=1, advice="To train without rollouts use --curriculum-mode off.")
    ] = 4
    """Responses per sampled problem (K), guided ones included."""

    rollout_guided_samples: NonNegativeInt | None = None
    """Number of the K responses that continue the beginning of the demonstration. They are graded, but not trained on. They show whether the
    policy does worse if it begins like the demonstration, above all where it fails (--weighting-guidance-solved). If it does
    (--weighting-guidance-threshold), the steps train on the policy's own solutions only, otherwise on demonstrations only. 0: they train on
    both. Unset: 1 with the adaptive rule of the rasft objective if K is 3 or more and --weighting-rollout-total is not 0; otherwise 0."""

    rollout_guided_share: Annotated[float, Range(above=0, below=1)] = 0.3
    """Share of a demonstration's tokens with which its guided responses begin, rounded down, but at least one token."""

    rollout_temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0 takes the most likely token."""

    rollout_top_p: Annotated[float, Range(above=0, at_most=1, advice="Use 1 to keep every token.")] = 1.0
    """Nucleus sampling: sample from the smallest set of tokens whose total probability reaches this. 1 keeps every token."""

    rollout_repetition_penalty: Annotated[float, Range(above=0, advice="Use 1 for none.")] = 1.0
    """Penalty on tokens that occurred before; 1 is off. The published script uses 1.1."""

    rollout_max_new_tokens: PositiveInt = 1024
    """Longest response, in tokens. Prompt and response together must fit --seq-length."""

    rollout_batch_size: PositiveInt | None = None
    """Sequences that the embedded engine decodes at once on one replica. Unset: on a GPU the largest power of two up to 512 that
    fits the free memory, on a CPU 64. It changes the responses by rounding only."""

    rollout_seed: NonNegativeInt = 1234
    """Seed of sampling. The draws of a response depend only on this seed, the problem, the step of the weights and the response's
    number."""

    rollout_store: str | None = None
    """File to which every rollout is appended (.jsonl). Unset: rollouts.jsonl in --save; without --save rollouts are not stored."""

    rollout_replay: list[str] = field(default_factory=list)
    """Files of stored rollouts (--rollout-store of earlier runs) for --rollout-engine replay."""

    rollout_urls: list[str] = field(default_factory=list)
    """Addresses of SGLang servers, each http://host:port."""

    rollout_server_file: str | None = None
    """File in which tools/serve_rollouts.py lists its servers. It is read at every refresh, so servers may be added and removed."""

    rollout_api_key_env: str | None = None
    """Environment variable that holds the servers' --api-key. The key itself is not a flag, because flags are logged."""

    rollout_admin_api_key_env: str | None = None
    """Environment variable that holds the servers' --admin-api-key, if they have one."""

    rollout_concurrency: PositiveInt = 256
    """Maximum number of running requests per server. The server's own limit applies too. One request samples one response."""

    rollout_deadline_s: PositiveFloat = 600.0
    """Longest time that a server may take for one response, seconds.

    A slower server counts as hung, and other servers are asked.
    """

    rollout_watch_s: PositiveFloat = 60.0
    """Longest time that a busy server may take to answer a health check, seconds. A slower server counts as hung."""

    rollout_attempts: PositiveInt = 3
    """Attempts to sample a response before it is given up, each at another server if possible."""

    rollout_wait_s: NonNegativeFloat = 600.0
    """Longest wait for servers, seconds: for --rollout-min-servers at the start of the run, later for the first one."""

    rollout_min_servers: PositiveInt = 1
    """Number of servers for which the run waits before its first refresh. Later refreshes use the servers that answer."""

    rollout_without_servers: Literal["error", "demonstrations"] = "error"
    """Action of a refresh when no server answers. error: end the run with an error; demonstrations: train on the demonstrations
    alone."""

    rollout_max_logprob_gap: Annotated[
        float | None,
        Range(above=0, advice="Two programs never agree in every bit. Use inf to accept every server."),
    ] = 0.1
    """Largest mean difference between a server's log-probabilities and the trainer's after a sync, nats per token on a few
    demonstrations. A server with a larger difference is left out. bf16 kernels differ by 0.01 to 0.03."""

    rollout_lag: Literal[0, 1] = 0
    """0: the steps wait for rollouts of the current weights; 1: servers sample the rollouts of the next refresh during the steps of
    this refresh, so the rollouts are one refresh old."""

    @property
    def most_guided_samples(self) -> int:
        """The largest --rollout-guided-samples."""
        return max(0, self.rollout_num_samples - _MIN_UNGUIDED)

    def check(self) -> None:
        for url in self.rollout_urls:
            check_address(url, flag_name("rollout_urls"))
        if self.rollout_guided_samples and self.rollout_guided_samples > self.most_guided_samples:
            raise self.refusal(
                "rollout_guided_samples",
                f"leaves fewer than {_MIN_UNGUIDED} of --rollout-num-samples {self.rollout_num_samples} without a guide: where one of them "
                "has failed, the other ones show how often the policy solves the problem. The largest value is "
                f"{self.most_guided_samples}.",
            )
        has_servers = bool(self.rollout_urls) or self.rollout_server_file is not None
        if self.rollout_engine == "sglang" and not has_servers:
            raise self.refusal(
                "rollout_engine",
                "needs servers: --rollout-urls http://HOST:PORT [...], or --rollout-server-file FILE as tools/serve_rollouts.py "
                "writes it.",
            )
        if self.rollout_engine != "sglang" and self.rollout_lag:
            raise self.refusal(
                "rollout_lag",
                f"needs --rollout-engine sglang, got {self.rollout_engine}: only servers can sample during the trainer's steps.",
            )
        if self.rollout_engine == "replay" and not self.rollout_replay:
            raise self.refusal(
                "rollout_engine", "needs --rollout-replay FILE [FILE ...]: the rollouts of earlier runs."
            )
        if self.rollout_replay and self.rollout_engine != "replay":
            raise self.refusal(
                "rollout_replay",
                f"needs --rollout-engine replay, got {self.rollout_engine}, which samples new rollouts. Change the engine, or leave "
                "the files out.",
            )


def check_address(text: str, where: str) -> str:
    """Normalises a server's address, so that two spellings of it do not count as two servers.

    Raises:
        ValueError: ``text`` is not ``http://host:port``; the message begins with ``where``.
    """
    if "@" in text:
        raise ValueError(
            f"{where}: an address must not contain a user or password. Every log would show them, and they would be sent instead of "
            "the API key. Write it as http://host:port, and name the variable of the key with --rollout-api-key-env."
        )
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
        is_address = parts.scheme in ("http", "https") and bool(host.encode("idna")) and port is not None
        is_address &= parts.path in ("", "/") and not parts.query and not parts.fragment
    except ValueError:  # also UnicodeError: no resolver accepts such a host name
        is_address = False
    if not is_address or not text.isprintable() or " " in text:
        raise ValueError(f"{where}: {text!r} is not a valid server address. Write it as http://host:port.")
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port}"
