"""The rollout engine on real servers, and checks that every result must pass."""

import random
from typing import Any

from megatron_rasft.config import RolloutConfig
from megatron_rasft.rollout.engine import SglangEngine
from megatron_rasft.rollout.fleet import Fleet
from megatron_rasft.rollout.sampling import Answers
from megatron_rasft.servers.record import ServerRecords
from megatron_rasft.types import Request, SamplingParams
from tests.servers.faulty_proxy import wait_for

VERSION = 5
EOS = 0
VOCABULARY = 26


def params(**changes: Any) -> SamplingParams:
    values: dict[str, Any] = {
        "num_samples": 2,
        "max_new_tokens": 12,
        "temperature": 1.0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "stop_ids": frozenset({EOS}),
        "max_batch_size": 8,
    }
    return SamplingParams(**{**values, **changes})


def requests_of(num: int, num_samples: int = 2) -> list[Request]:
    draw = random.Random(1)
    return [
        Request(
            prompt_ids=[draw.randrange(1, VOCABULARY) for _ in range(draw.randrange(2, 24))],
            seeds=[i * num_samples + k for k in range(num_samples)],
        )
        for i in range(num)
    ]


class Rollouts:
    """The engine on the servers at some addresses, all labelled with and admitted at ``VERSION``."""

    def __init__(self, *urls: str, **flags: Any) -> None:
        self.said: list[str] = []
        values: dict[str, Any] = {
            "rollout_engine": "sglang",
            "rollout_urls": list(urls),
            "rollout_wait_s": 60.0,
        }
        self.records = ServerRecords()
        self.fleet = Fleet(RolloutConfig(**{**values, **flags}), self.records, say=self.said.append)
        self.engine = SglangEngine(self.fleet)
        for record in self.fleet.find():
            record.client.set_weight_version(VERSION)
            self.fleet.admit(record.url, VERSION)

    def generate(self, requests: list[Request], sampling: SamplingParams | None = None) -> Answers:
        answers = self.engine.generate(requests, sampling or params(), VERSION)
        check_accounting(requests, answers)
        return answers

    def __enter__(self) -> "Rollouts":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.engine.close()
        self.records.close()


def check_accounting(requests: list[Request], answers: Answers) -> None:
    """Checks that the report counts every sample once, and that every response is complete."""
    report = answers.report
    assert sum(report.outcomes.values()) == report.num_samples == sum(len(r.seeds) for r in requests)
    assert [len(group) for group in answers.responses] == [len(r.seeds) for r in requests]
    finished = [r for group in answers.responses for r in group if r is not None]
    assert len(finished) == report.num_finished
    assert sum(report.samples_by_server.values()) == report.num_finished
    for response in finished:
        assert len(response.token_ids) == len(response.logprobs) > 0
        assert EOS not in response.token_ids[:-1]
        assert (response.finish_reason == "stop") == (response.token_ids[-1] == EOS)


def in_mid_rollout(rollouts: Rollouts, urls: tuple[str, str], requests: list[Request]) -> None:
    """Starts sampling, and returns when both servers have finished some samples."""
    before = {r.url: r.num_samples for r in rollouts.fleet.records}
    rollouts.engine.start(requests, params(max_new_tokens=40, stop_ids=frozenset({VOCABULARY - 1})), VERSION)
    wait_for(lambda: all(r.num_samples > before[r.url] + 2 for r in rollouts.fleet.records if r.url in urls))
