"""Plain stand-ins for the parts of a refresh: no model, no server, no process."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_rasft.config import CurriculumConfig, RasftConfig, RolloutConfig
from megatron_rasft.monitoring.stopping import StopRequest
from megatron_rasft.rollout.sampling import Answers, SamplingReport
from megatron_rasft.training.reference import LogprobCache
from megatron_rasft.training.refresh import Refresh, sampling_params
from megatron_rasft.types import (
    Check,
    Demonstration,
    Request,
    Response,
    Rollout,
    SamplingParams,
    TrainingSample,
)

STOP_IDS = frozenset({9})


def config_of(**packages: Any) -> RasftConfig:
    """The default configuration without guided rollouts, with some sections replaced, such as ``rollout=RolloutConfig(...)``."""
    return RasftConfig(**{"rollout": RolloutConfig(rollout_guided_samples=0)} | packages)


def demonstrations(
    num: int, fields: dict[str, Any] | None = None, has_teacher: bool = False
) -> list[Demonstration]:
    """Problem ``i`` has the prompt [1, i], the response [5, 9], and the prompt [2, 5, 1, i] of a teacher.

    Args:
        fields: the row that an own function receives.
    """
    return [
        Demonstration(
            problem_id=f"p{i}",
            problem="",
            response="",
            answer="5",
            prompt_ids=[1, i],
            response_ids=[5, 9],
            fields=fields,
            teacher_prompt_ids=[2, 5, 1, i] if has_teacher else [],
        )
        for i in range(num)
    ]


class FirstTokenVerifier:
    """A verifier for which a rollout is correct if its first token is 5."""

    def verify(
        self, rollouts: Sequence[Rollout], checks: Mapping[str, Check], look_up: Callable[[], None]
    ) -> None:
        look_up()
        for rollout in rollouts:
            assert rollout.problem_id in checks
            rollout.verdict = "correct" if rollout.response_ids[0] == 5 else "wrong"


def decode(ids: list[int]) -> str:
    """Words that pass the default text filters, and that differ between two responses by more than a near-duplicate."""
    return " ".join(f"{word}{token}" for token in ids for word in ("first", "second", "third", "fourth"))


def refresh_of(config: RasftConfig, num_problems: int = 8, judges: bool = False, **changes: Any) -> Refresh:
    """A refresh of a run with 2 problems per step and 12 steps. ``judges``: whether an own function grades."""
    values: dict[str, Any] = {
        "batch_size": 2,
        "total_steps": 12,
        "sampling": sampling_params(config, STOP_IDS, 64),
        "decode": decode,
        "verifier": FirstTokenVerifier(),
        "cache": LogprobCache(None, ""),
    }
    has_teacher = config.objective.teacher() is not None
    problems = demonstrations(num_problems, {"problem": ""} if judges else None, has_teacher)
    return Refresh(config, problems, **values | changes)


def response(*ids: int) -> Response:
    return Response(token_ids=list(ids), logprobs=[-1.0] * len(ids), finish_reason="stop")


@dataclass
class PolicyOfNotes:
    """A policy that answers every seed with the tokens [5 or 6, its position, 9] and records its calls."""

    difficulties: dict[str, float] = field(default_factory=dict)
    """Problem id -> cross-entropy of its demonstration, nats per token; 1.0 for the others."""
    is_stopped: bool = False
    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stop = StopRequest(lambda: self.is_stopped)

    def score(self, samples: Sequence[TrainingSample], *, with_reference: bool) -> list[list[float]]:
        if samples:
            self.calls.append(f"score {len(samples)} {'reference' if with_reference else 'policy'}")
        return [[-self.difficulties.get(s.problem_id, 1.0)] * len(s.response_ids) for s in samples]

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Response]]:
        self.calls.append(f"generate {len(requests)}")
        return [answers(request) for request in requests]


def answers(request: Request) -> list[Response]:
    """Every second response is correct."""
    return [response(5 + index % 2, index, 9) for index in range(len(request.seeds))]


@dataclass
class ServersOfNotes:
    """Rollout servers that answer at once and record their calls."""

    calls: list[str] = field(default_factory=list)
    requests: Sequence[Request] = ()

    def sync(
        self, weight_version: int, probes: Sequence[TrainingSample], stop: StopRequest
    ) -> dict[str, float]:
        self.calls.append(f"sync {weight_version}")
        return {"sync/servers": 1.0}

    def start(self, requests: Sequence[Request], params: SamplingParams, weight_version: int) -> None:
        self.calls.append(f"start {[r.prompt_ids[1] for r in requests]} with {weight_version}")
        self.requests = requests

    def wait(self, check: Callable[[], None]) -> None:
        self.calls.append("wait")
        check()

    def result(self) -> Answers:
        self.calls.append("result")
        return Answers([answers(r) for r in self.requests], SamplingReport())

    def sleep(self) -> None:
        self.calls.append("sleep")


BAND = CurriculumConfig(curriculum_mode="band")
