"""Rank 0's session without any transfer: its requests, their order, and the consequences of failures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rasft.config import SyncConfig
from megatron_rasft.sync.nccl_versions import Pair
from megatron_rasft.sync.report import SyncReport
from megatron_rasft.sync.session import ServerSession
from megatron_rasft.sync.streaming import Outcome
from megatron_rasft.tools.conversion.fp8_folders import quantization_config
from tests.unit.sync.stand_ins import StandIn, records_of

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
}
A, B = "http://a:1", "http://b:1"


class Syncs:
    """A session with some servers. The test sets the outcomes of the transfers of its syncs."""

    def __init__(self, *servers: StandIn, device: str = "cpu", nccl: Any = None, **flags: Any) -> None:
        self.servers = servers
        self.urls = [server.url for server in servers]
        self.groups: list[str] = []
        config = SyncConfig(**{"sync_timeout_s": 600.0, **flags})
        self.session = ServerSession(config, records_of(*servers), CONFIG, device, nccl)

    def run(self, version: int, *outcomes: Outcome, urls: Sequence[str] | None = None) -> SyncReport:
        """Syncs once. The first transfers have these outcomes; later transfers succeed."""
        report, left = SyncReport(weight_version=version), list(outcomes)
        while True:
            attempt = self.session.prepare(self.urls if urls is None else urls, report)
            if not attempt.servers:
                return report
            self.groups.append(attempt.group)
            if self.session.conclude(attempt, left.pop(0) if left else Outcome(), report):
                return report


def failure(*urls: str, reason: str = "out of order") -> Outcome:
    return Outcome(failed=dict.fromkeys(urls, reason), reason=reason)


def test_requests_of_a_sync_are_sent_in_order() -> None:
    server = StandIn(A)
    report = Syncs(server).run(7)
    assert report.synced == [A] and not report.failed and report.num_attempts == 1
    assert server.calls == [
        "probe", "pause abort", "begin", "end", "flush", "label", "weight_version", "resume",
    ]  # fmt: skip
    assert server.label == 7 and not server.is_paused


def test_the_group_is_kept_while_nothing_changes() -> None:
    syncs = Syncs(StandIn(A), StandIn(B))
    for version in (1, 2):
        syncs.run(version)
    assert syncs.groups[0] == syncs.groups[1]
    syncs.run(3, urls=[A])
    assert syncs.groups[2] != syncs.groups[1], "one server fewer"


def test_an_update_session_left_open_is_closed_first() -> None:
    server = StandIn(A)
    server.is_open = True
    assert Syncs(server).run(1).synced
    assert server.calls[2:5] == ["begin", "end", "begin"]


def test_servers_without_update_sessions_are_paused_by_abort_in_every_mode() -> None:
    old, new = StandIn(A, has_update_session=False), StandIn(B)
    Syncs(old, new, sync_pause_mode="retract").run(1)
    assert "pause abort" in old.calls and "pause retract" in new.calls
    assert "begin" not in old.calls and "end" not in old.calls


def test_in_place_keeps_the_cache() -> None:
    server = StandIn(A)
    Syncs(server, sync_pause_mode="in_place").run(1)
    assert "pause in_place" in server.calls and "flush" not in server.calls


@pytest.mark.parametrize("call", ["probe", "pause abort", "begin", "end", "flush", "label", "resume"])
def test_a_server_that_fails_a_request_is_left_out_until_the_next_sync(call: str) -> None:
    bad, good = StandIn(A), StandIn(B)
    syncs = Syncs(bad, good)
    syncs.run(1)
    bad.before[call] = lambda: bad.fail("out of order")
    report = syncs.run(2)
    assert report.synced == [B] and report.failed == {A: "out of order"}
    assert good.label == 2 and not good.is_paused
    del bad.before[call]
    assert syncs.run(3).synced == [A, B]
    assert syncs.groups[-1] not in syncs.groups[:-1], "it needs a new group"


def test_a_transfer_that_fails_is_repeated_without_the_servers_at_fault() -> None:
    syncs = Syncs(StandIn(A), StandIn(B))
    syncs.run(1)
    report = syncs.run(2, failure(A))
    assert report.synced == [B] and report.failed == {A: "out of order"} and report.num_attempts == 2
    assert syncs.groups[-1] not in syncs.groups[:-1]


def test_a_transfer_that_fails_without_a_culprit_is_repeated_once_with_all_servers() -> None:
    syncs = Syncs(StandIn(A), StandIn(B))
    report = syncs.run(1, failure())
    assert report.synced == [A, B] and report.num_attempts == 2
    report = syncs.run(2, failure(), failure())
    assert not report.synced and set(report.failed) == {A, B} and report.num_attempts == 2


def test_a_failure_of_the_trainer_itself_is_raised() -> None:
    with pytest.raises(ValueError, match="--sync-port"):
        Syncs(StandIn(A)).run(1, Outcome(reason="--sync-port 1", refusal="--sync-port 1"))


def test_bytes_are_those_of_the_last_attempt_and_seconds_those_of_all() -> None:
    first, second = failure(), Outcome(num_bytes=5, num_buckets=2, seconds={"send": 2.0})
    first.num_bytes, first.seconds = 3, {"send": 1.0}
    report = Syncs(StandIn(A)).run(1, first, second)
    assert (report.num_bytes, report.num_buckets, report.seconds["send"]) == (5, 2, 3.0)


def on_gpus(*servers: StandIn) -> Syncs:
    return Syncs(*servers, device="cuda", nccl=lambda: Pair("2.14", "2.30.7"))


def test_servers_whose_nccl_differs_are_named_and_blamed_for_a_failure_without_a_culprit() -> None:
    old, new = StandIn(A), StandIn(B)
    old.change(version="0.5.18")
    new.change(version="0.5.23.post1")
    syncs = on_gpus(old, new)
    report = syncs.run(1, failure(reason="Mismatched NCCL version"))
    assert report.synced == [B] and list(report.failed) == [A]
    (note,) = report.notes
    for text in (note, report.failed[A]):
        assert "2.29.7" in text and "2.30.7" in text and "SGLang 0.5.22 to 0.5.23" in text
    assert A in note
    assert not syncs.run(2).notes, "printed once a run"


def test_a_server_of_an_unknown_version_is_synced_and_named_once() -> None:
    server = StandIn(A)
    server.change(version="0.6.0")
    syncs = on_gpus(server)
    report = syncs.run(1)
    assert report.synced and len(report.notes) == 1 and "0.6.0" in report.notes[0]
    assert not syncs.run(2).notes
    server.restart()
    assert not syncs.run(3).notes


def test_nccl_is_compared_only_if_weights_are_broadcast_between_gpus() -> None:
    server = StandIn(A)
    server.change(version="0.5.18")
    assert not Syncs(server, device="cuda", sync_method="tensor").run(1).notes
    assert not Syncs(server).run(1).notes


@pytest.mark.parametrize("is_gone_at_a_sync", [False, True])
def test_a_restarted_server_gets_a_new_group(is_gone_at_a_sync: bool) -> None:
    server = StandIn(A)
    syncs = Syncs(server)
    syncs.run(1)
    server.restart()
    if is_gone_at_a_sync:
        server.before["probe"] = lambda: server.fail("cannot be reached", None)
        assert not syncs.run(2).synced
        del server.before["probe"]
    report = syncs.run(3)
    assert report.synced and report.num_attempts == 1 and len(set(syncs.groups)) == 2


def test_another_label_than_the_one_set_is_a_failure() -> None:
    server = StandIn(A)
    server.before["weight_version"] = lambda: setattr(server, "label", 3)
    report = Syncs(server).run(4)
    assert not report.synced and "step 3" in report.failed[A]
    assert server.is_paused, "its weights are not known"


def test_a_sync_without_servers_is_a_report() -> None:
    server = StandIn(A)
    server.before["probe"] = lambda: server.fail("cannot be reached", None)
    report = Syncs(server).run(1)
    assert (report.synced, report.failed, report.num_attempts) == ([], {A: "cannot be reached"}, 0)
    assert Syncs().run(1).synced == []


@pytest.mark.parametrize(
    ("flags", "changes", "device", "proof"),
    [
        ({}, {"has_weights_checker": True}, "cpu", "checksum"),
        ({}, {}, "cpu", "none"),
        ({}, {"architectures": ("LlamaForCausalLM",)}, "cuda", "read_back"),
        ({}, {"architectures": ("Qwen2ForCausalLM",)}, "cuda", "none"),
        ({"sync_proof": "read_back"}, {}, "cpu", "read_back"),
        ({"sync_proof": "off"}, {"has_weights_checker": True}, "cpu", "none"),
    ],
)
def test_the_proof_is_the_strongest_that_these_servers_can_give(
    flags: dict[str, Any], changes: dict[str, Any], device: str, proof: str
) -> None:
    server = StandIn(A)
    server.change(**changes)
    config = {**CONFIG, "architectures": ["LlamaForCausalLM", "Qwen2ForCausalLM"]}
    session = ServerSession(SyncConfig(**flags), records_of(server), config, device, lambda: Pair("", ""))
    assert session.prepare([A], SyncReport(weight_version=1)).proof == proof


UNFIT: list[tuple[dict[str, Any], str]] = [
    ({"dp_size": 2}, "--dp-size 2"),
    ({"pp_size": 2}, "--pp-size 2"),
    ({"architectures": ("LlamaForCausalLM",)}, "LlamaForCausalLM"),
    ({"model_config": {"hidden_size": 32}}, "hidden_size"),
    ({"quantization": "fp8"}, "--quantization fp8"),
    ({"dtype": "int8"}, "int8"),
    ({"model_config": {"quantization_config": {"quant_method": "gptq"}}}, "gptq"),
]


@pytest.mark.parametrize(("change", "named"), UNFIT)
def test_a_first_sync_that_no_server_fits_is_refused(change: dict[str, Any], named: str) -> None:
    server = StandIn(A)
    server.change(**change)
    with pytest.raises(ValueError, match=f"{A} .*{named}"):
        Syncs(server).run(1)


@pytest.mark.parametrize(("change", "named"), [*UNFIT, ({"dtype": "float16"}, "float16")])
def test_an_unfit_server_that_joins_a_run_is_left_out(change: dict[str, Any], named: str) -> None:
    good, late = StandIn(A), StandIn(B)
    syncs = Syncs(late, good)
    syncs.run(1, urls=[A])
    late.change(**change)
    for version in (2, 3):
        report = syncs.run(version)
        assert report.synced == [A] and named in report.failed[B]
        assert good.label == version and not good.is_paused and not good.is_open
    assert len(set(syncs.groups)) == 1, "the group of the others stays"
    assert set(late.calls) == {"probe"}, "it was not even paused"


def test_a_run_whose_only_server_becomes_unfit_gets_a_report() -> None:
    server = StandIn(A)
    syncs = Syncs(server)
    syncs.run(1)
    server.change(dp_size=2)
    report = syncs.run(2)
    assert report.synced == [] and "--dp-size 2" in report.failed[A]


def test_the_first_sync_sends_the_most_frequent_format_and_later_ones_the_same() -> None:
    servers = [StandIn(f"http://{name}:1") for name in "abcd"]
    a, b, c, d = (server.url for server in servers)
    for server in servers[:2]:
        server.change(model_config={"dtype": "float16"})
    syncs = Syncs(*servers)
    assert syncs.run(1, urls=[b, c, d]).synced == [c, d]
    report = syncs.run(2, urls=[a, b, c])
    assert report.synced == [c] and list(report.failed) == [a, b]


@pytest.mark.parametrize(
    ("flags", "way_out"),
    [
        ({"sync_method": "disk", "sync_disk_folder": "there"}, "--sync-method broadcast"),
        ({"sync_proof": "checksum"}, "--sync-proof auto"),
    ],
)
def test_flags_that_do_not_work_with_fp8_servers_are_refused(flags: dict[str, Any], way_out: str) -> None:
    server = StandIn(A)
    server.change(model_config={**CONFIG, "quantization_config": quantization_config([])})
    with pytest.raises(ValueError, match=f"{A} serves FP8.* {way_out}"):
        Syncs(server, **flags).run(1)


def test_a_server_that_loaded_an_export_keeps_the_type_of_its_start(tmp_path: Path) -> None:
    server = StandIn(A)
    server.change(model_path="/models/start", model_config={**CONFIG, "dtype": "float16"})
    syncs = Syncs(server, sync_method="disk", sync_disk_folder=str(tmp_path))
    report = SyncReport(weight_version=1)
    assert syncs.session.prepare([A], report).wire_format.dtype == torch.float16
    server.change(model_path=str(tmp_path / "weights-1"), model_config={**CONFIG, "dtype": "bfloat16"})
    assert syncs.session.prepare([A], report).wire_format.dtype == torch.float16
    server.change(model_path="/models/start")
    assert syncs.session.prepare([A], report).wire_format.dtype == torch.bfloat16, "restarted"


class Sleeper(StandIn):
    """A server that fails if it must resume memory that it has not released, as SGLang would end."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.released: set[str] = set()

    def release_memory(self, tags: Any = None, deadline_s: float | None = None) -> None:
        super().release_memory(tags)
        self.released |= set(tags)

    def resume_memory(self, tags: Any = None, deadline_s: float | None = None) -> None:
        super().resume_memory(tags)
        if not self.released >= set(tags):
            self.fail("KeyError", None)
        self.released -= set(tags)


@pytest.fixture
def asleep() -> tuple[Syncs, Sleeper, Sleeper]:
    """Two servers that have been synced once and are asleep."""
    one, two = Sleeper(A), Sleeper(B)
    syncs = Syncs(one, two, sync_method="tensor")
    syncs.run(1)
    assert syncs.session.sleep([A, B]) == {}
    return syncs, one, two


def test_a_sleeping_server_takes_its_weights_back_first(asleep: tuple[Syncs, Sleeper, Sleeper]) -> None:
    syncs, server, _ = asleep
    syncs.run(2)
    wanted = [
        "release weights kv_cache",
        "resume weights",
        "begin",
        "end",
        "resume kv_cache",
        "flush",
        "resume",
    ]
    last = server.calls.index(wanted[0])
    assert [call for call in server.calls[last:] if call in wanted] == wanted
    server.calls.clear()
    syncs.run(3)
    assert "resume weights" not in server.calls


def test_memory_is_taken_back_once_in_several_attempts(asleep: tuple[Syncs, Sleeper, Sleeper]) -> None:
    syncs, bad, good = asleep
    report = syncs.run(2, failure(A))
    assert report.synced == [B] and report.num_attempts == 2
    assert good.calls.count("resume weights") == 1 and not good.released
    assert bad.released == {"kv_cache"}
    assert syncs.run(3).synced == [A, B] and not bad.released


@pytest.mark.parametrize("tag", ["weights", "kv_cache"])
def test_a_server_that_did_not_wake_is_woken_by_the_next_sync(
    tag: str, asleep: tuple[Syncs, Sleeper, Sleeper]
) -> None:
    syncs, late, _ = asleep
    late.before[f"resume {tag}"] = lambda: late.fail("did not answer within 20 s", None)
    assert syncs.run(2).synced == [B]
    del late.before[f"resume {tag}"]
    assert syncs.run(3).synced == [A, B] and not late.released


def test_a_restarted_server_is_awake(asleep: tuple[Syncs, Sleeper, Sleeper]) -> None:
    syncs, server, _ = asleep
    server.restart()
    server.released = set()
    server.calls.clear()
    assert syncs.run(2).synced == [A, B]
    assert "resume weights" not in server.calls and "resume kv_cache" not in server.calls


def test_a_server_that_failed_half_awake_is_put_to_sleep_whole(
    asleep: tuple[Syncs, Sleeper, Sleeper],
) -> None:
    syncs, bad, good = asleep
    syncs.run(2, failure(A))
    assert bad.released == {"kv_cache"} and not good.released
    bad.calls.clear()
    assert syncs.session.sleep([A, B]) == {}
    assert bad.released == good.released == {"weights", "kv_cache"}
    assert "release weights" in bad.calls, "it is not asked for what it has released already"
    assert syncs.run(3).synced == [A, B]
    assert not bad.released and not good.released


@pytest.mark.parametrize("woken", [0, 1, 2], ids=["asleep", "half", "awake"])
def test_the_next_run_wakes_servers_that_a_killed_run_left_asleep(
    woken: int, asleep: tuple[Syncs, Sleeper, Sleeper]
) -> None:
    killed, one, two = asleep
    if woken == 1:
        killed.run(2, failure(A), failure(B))
    elif woken == 2:
        killed.session.wake()
    syncs = Syncs(one, two, sync_method="tensor")
    assert syncs.run(1).synced == [A, B]
    assert not one.released and not two.released and not one.is_paused


def test_a_server_that_slept_keeps_its_group_and_is_not_proven_again(
    asleep: tuple[Syncs, Sleeper, Sleeper],
) -> None:
    syncs, *servers = asleep
    for server in servers:
        server.change(has_weights_checker=True)
    report = SyncReport(weight_version=2)
    attempt = syncs.session.prepare([A, B], report)
    assert attempt.group == syncs.groups[-1] and attempt.proof == "none"


def test_a_run_wakes_its_servers_when_it_ends(asleep: tuple[Syncs, Sleeper, Sleeper]) -> None:
    syncs, gone, server = asleep
    gone.before["resume weights"] = lambda: gone.fail("cannot be reached", None)
    assert syncs.session.wake() == {A: "cannot be reached"}
    assert not server.released and server.is_paused, "its weights are undefined"
    server.calls.clear()
    syncs.session.wake()
    assert server.calls == []


def test_the_disk_keeps_two_exports(tmp_path: Path) -> None:
    server = StandIn(A)
    syncs = Syncs(server, sync_method="disk", sync_disk_folder=str(tmp_path))
    for version in (1, 2, 3):
        attempt = syncs.session.prepare([A], SyncReport(weight_version=version))
        folder = tmp_path / f"weights-{version}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x" * 10)
        outcome = syncs.session.load_folder(attempt, folder)
        assert (outcome.num_bytes, outcome.num_buckets, outcome.reason) == (10, 1, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights-2", "weights-3"]
    assert [call for call in server.calls if call.startswith("disk")] == [
        f"disk weights-{version}" for version in (1, 2, 3)
    ]
    assert "begin" not in server.calls
