"""Whole runs whose rollouts come from real SGLang servers."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.functional import launching
from tests.functional.conftest import Workshop
from tests.functional.launching import Pause
from tests.servers.running import NEWEST, OLDEST, RunningServer, ServerPool
from tests.tiny_policy import write_mixture

STEPS = 6
REFRESHES = [0, 3, 5]
"""Steps of the refreshes: every 3 steps, and at the end of an epoch of 40 problems."""
LARGEST_GAP = 0.02
"""Largest difference in nats per token between the fp32 trainer and its own weights on a server; measured 1e-6 to 4e-3."""


def flags_of(workshop: Workshop, save: Path, *more: str, servers: tuple[RunningServer, ...]) -> list[str]:
    urls = [server.url for server in servers]
    flags = ["--save", str(save), "--train-iters", str(STEPS), "--rollout-engine", "sglang"]
    return workshop.flags(*flags, "--rollout-urls", *urls, *more)


def rollouts_of(save: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (save / "rollouts.jsonl").read_text().splitlines()]


def refreshes_of(save: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == "refresh"]


def assert_no_secret(folder: Path) -> None:
    """No log, status file, metric, setting, checkpoint or rollout of a run has a key, but they have the names of their variables."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"rank0.log", "status.json", "metrics.jsonl", "rollouts.jsonl"} <= {path.name for path in files}
    contents = [path.read_bytes() for path in files]
    assert not [path for path, content in zip(files, contents, strict=True) if b"the-secret" in content]
    assert any(b"SERVER_KEY" in content for content in contents)


@pytest.mark.parametrize(("version", "lag", "world_size"), [(OLDEST, 0, 1), (NEWEST, 0, 2), (NEWEST, 1, 1)])
def test_run_samples_from_a_server_with_its_own_weights(
    workshop: Workshop, server_pool: ServerPool, tmp_path: Path, version: str, lag: int, world_size: int
) -> None:
    server = server_pool.get(version, workshop.policy, "--dtype", "float32")
    save = tmp_path / "save"
    layout = ["--tensor-model-parallel-size", str(world_size), "--rollout-lag", str(lag)]
    keys = ["--rollout-api-key-env", "SERVER_KEY", "--rollout-admin-api-key-env", "ADMIN_KEY"]
    flags = flags_of(workshop, save, *layout, *keys, servers=(server,))
    secrets = {"SERVER_KEY": "the-secret-key", "ADMIN_KEY": "the-secret-admin-key"}
    outcome = launching.run(tmp_path / "logs", flags, world_size, variables=secrets)
    assert outcome.codes == [0] * world_size, outcome.output
    assert_no_secret(tmp_path)
    assert "proven by checksums of every tensor" in outcome.output
    rollouts = rollouts_of(save)
    assert len(rollouts) == STEPS * 8 * 4
    assert len({(r["problem_id"], r["sample_index"], r["weight_version"]) for r in rollouts}) == len(rollouts)
    asked = list(zip(REFRESHES, [0, *REFRESHES] if lag else REFRESHES, strict=False))
    found = sorted({(r["weight_version"] + r["policy_age"], r["weight_version"]) for r in rollouts})
    assert found == asked
    assert any(r["verdict"] == "correct" for r in rollouts)
    refreshes = refreshes_of(save)
    assert [r["step"] for r in refreshes] == REFRESHES
    gaps = [r["rollout/logprob_gap_nats"] for r in refreshes if "rollout/logprob_gap_nats" in r]
    assert gaps and max(gaps) < LARGEST_GAP
    assert all(record["objective/loss"] > 0 for record in launching.steps(save).values())


def test_experts_of_both_ranks_reach_the_server_of_a_run(
    workshop: Workshop, server_pool: ServerPool, tmp_path: Path
) -> None:
    model = write_mixture(tmp_path / "mixture", workshop.policy)
    server = server_pool.get(OLDEST, model, "--dtype", "float32")
    save = tmp_path / "save"
    layout = ["--expert-model-parallel-size", "2", "--moe-token-dispatcher-type", "alltoall"]
    flags = ["--save", str(save), "--train-iters", "2", "--rasft-refresh-interval", "1", *layout]
    flags += ["--rollout-engine", "sglang", "--rollout-urls", server.url]
    outcome = launching.succeed(tmp_path / "logs", workshop.flags(*flags, model=model), 2)
    assert "proven by checksums of every tensor" in outcome.output
    gaps = [r["rollout/logprob_gap_nats"] for r in refreshes_of(save)]
    assert len(gaps) == 2 and max(gaps) < LARGEST_GAP


def test_server_that_dies_and_returns_costs_rollouts_not_the_run(
    workshop: Workshop, server_pool: ServerPool, tmp_path: Path
) -> None:
    stays, dies = server_pool.pair(OLDEST, NEWEST, workshop.policy, "--dtype", "float32")
    save = tmp_path / "save"
    flags = flags_of(workshop, save, "--rasft-refresh-interval", "1", servers=(stays, dies))
    dead, alive = tmp_path / "dead", tmp_path / "alive"

    def play() -> None:
        wait_for(lambda: step_numbers(save)[-1:] == [2])
        dies.kill()
        dead.touch()
        wait_for(lambda: step_numbers(save)[-1:] == [4])
        dies.start()
        dies.wait_until_ready()
        alive.touch()

    faults = threading.Thread(target=play)
    faults.start()
    pauses = [Pause(step=2, until=dead), Pause(step=4, until=alive)]
    outcome = launching.run(tmp_path / "logs", flags, pauses=pauses, timeout_s=1000)
    faults.join()
    assert outcome.codes == [0], outcome.output
    assert f"rollout server {dies.url} is back, with the weights of step" in outcome.output
    assert sum(f"rollout server {dies.url}" in line for line in outcome.output.splitlines()) <= 4
    rollouts = rollouts_of(save)
    assert len({(r["problem_id"], r["sample_index"], r["weight_version"]) for r in rollouts}) == len(rollouts)
    servers = [r["rollout/servers"] for r in refreshes_of(save)]
    assert servers == [2, 2, 1, 1, 2, 2]


def test_without_any_server_a_run_ends_in_one_line_or_trains_on_demonstrations(
    workshop: Workshop, tmp_path: Path
) -> None:
    flags = ["--rollout-engine", "sglang", "--rollout-urls", "http://127.0.0.1:9", "--rollout-wait-s", "1"]
    flags += ["--train-iters", "2", "--save", str(tmp_path / "save")]
    outcome = launching.run(tmp_path / "refused", workshop.flags(*flags), 2)
    assert outcome.codes == [1, 1], outcome.output
    (error,) = outcome.errors
    assert "no rollout server answered within 1 s" in error and "http://127.0.0.1:9" in error
    flags += ["--rollout-without-servers", "demonstrations"]
    outcome = launching.succeed(tmp_path / "alone", workshop.flags(*flags), 2)
    assert "training on demonstrations alone" in outcome.output
    assert len(launching.steps(tmp_path / "save")) == 2
    assert not (tmp_path / "save" / "rollouts.jsonl").exists() or not rollouts_of(tmp_path / "save")


def step_numbers(save: Path) -> list[int]:
    return list(launching.steps(save)) if (save / "metrics.jsonl").exists() else []


def wait_for(is_so: Callable[[], bool], timeout_s: float = 900) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "what the test waits for has not come"
        time.sleep(0.1)
