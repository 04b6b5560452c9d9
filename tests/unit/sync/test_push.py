"""The state machine of a sync, on one rank: what is asked of a server in which order, and what a failure leads to."""

import hashlib
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rasft import metrics
from megatron_rasft.config import SyncConfig
from megatron_rasft.sync import WeightSync, push, streaming
from megatron_rasft.sync.buckets import Arena
from megatron_rasft.sync.groups import GroupFailure
from megatron_rasft.sync.nccl_versions import Pair
from megatron_rasft.weights.fp8_blocks import quantization_config
from tests.unit.sync.stand_ins import StandIn
from tests.unit.sync.test_buckets import Planned, model

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
}


@pytest.fixture(autouse=True)
def world(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Trainer:
    """Random weights, and a sync of them to stand-ins."""

    def __init__(self, servers: list[StandIn], **flags: Any) -> None:
        self.servers = {server.url: server for server in servers}
        torch.manual_seed(2)
        self.weights = {t.name: torch.randn(t.shape) for t in model(hidden=128)}
        options = {"export": flags.pop("export")} if "export" in flags else {}
        self.sync = WeightSync(
            SyncConfig(
                **{"sync_bucket_mib": 1, "sync_timeout_s": 20.0, "sync_address": "127.0.0.1", **flags}
            ),
            plan=self._plan,
            gather=self._gather,
            connect=self.servers.__getitem__,  # type: ignore[arg-type]
            model_config=CONFIG,
            device=torch.device("cpu"),
            stage=0,
            num_stages=1,
            takes_part=True,
            **options,
        )

    def _plan(self, *, dtypes: dict[str, torch.dtype] | None = None) -> list[Any]:
        return [t._replace(dtype=(dtypes or {}).get(t.name, torch.float32)) for t in model(hidden=128)]

    def _gather(
        self, *, dtypes: dict[str, torch.dtype], out: Callable[[str], Tensor | None]
    ) -> Iterator[tuple[str, Tensor | None]]:
        for name, tensor in self.weights.items():
            memory = out(name)
            yield name, tensor.to(dtypes[name]) if memory is None else memory.copy_(tensor)

    def push(self, version: int) -> Any:
        return self.sync.push(version, list(self.servers))

    def check_held(self, server: StandIn) -> None:
        assert set(server.weights) == set(self.weights)
        for name, tensor in self.weights.items():
            assert torch.equal(server.weights[name], tensor.to(torch.bfloat16)), name


def test_a_sync_pauses_opens_sends_flushes_labels_and_goes_on() -> None:
    server = StandIn("http://a:1")
    trainer = Trainer([server])
    report = trainer.push(7)
    assert report.synced == ["http://a:1"] and not report.failed and report.num_attempts == 1
    trainer.check_held(server)
    assert [call for call in server.calls if call != "update"] == [
        "probe", "pause abort", "begin", "init", "end", "flush", "label", "weight_version", "resume",
    ]  # fmt: skip
    assert server.calls.count("update") == report.num_buckets > 1
    assert report.num_bytes == sum(2 * t.numel() for t in trainer.weights.values())
    assert report.values()[metrics.SYNC_SERVERS] == 1 and "step 7 on 1 server(s)" in report.line()
    server.calls.clear()
    trainer.push(8)
    assert "init" not in server.calls, "the group is kept"


def test_the_memory_stays_for_the_next_sync_unless_one_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counted(Arena):
        def __init__(self, num_bytes: int, device: torch.device, is_shared: bool) -> None:
            super().__init__(num_bytes, device, is_shared)
            made.append(num_bytes)

    monkeypatch.setattr(streaming, "Arena", Counted)
    server = StandIn("http://a:1")
    trainer = Trainer([server])
    reports = [trainer.push(version) for version in range(3)]
    assert len(made) == 1
    assert all(report.peak_bytes >= made[0] for report in reports[1:]), "what rests counts too"
    server.before["update"] = lambda: server.fail("out of order")
    assert not trainer.push(3).synced
    del server.before["update"]
    trainer.push(4)
    trainer.check_held(server)
    assert len(made) == 2, "the broadcast that was given up may still have read the first"


def test_a_session_left_open_is_closed_first() -> None:
    server = StandIn("http://a:1")
    server.is_open = True
    assert Trainer([server]).push(1).synced
    assert server.calls[2:5] == ["begin", "end", "begin"]


def test_servers_without_sessions_are_paused_by_abort_whatever_the_mode() -> None:
    old, new = StandIn("http://a:1", has_update_session=False), StandIn("http://b:1")
    Trainer([old, new], sync_pause_mode="retract").push(1)
    assert "pause abort" in old.calls and "pause retract" in new.calls


def test_in_place_keeps_the_cache() -> None:
    server = StandIn("http://a:1")
    Trainer([server], sync_pause_mode="in_place").push(1)
    assert "pause in_place" in server.calls and "flush" not in server.calls


@pytest.mark.parametrize(
    "call", ["probe", "pause abort", "begin", "init", "update", "end", "flush", "label", "resume"]
)
def test_a_server_that_fails_anywhere_is_left_out_and_gets_a_full_sync_over_a_new_group_later(
    call: str,
) -> None:
    bad, good = StandIn("http://bad:1"), StandIn("http://good:1")
    trainer = Trainer([bad, good])
    trainer.push(1)
    if call == "init":
        bad.restart()  # else there is no new group to join
    bad.before[call] = lambda: bad.fail("out of order")
    trainer.weights["model.norm.weight"] += 1
    report = trainer.push(2)
    assert report.synced == ["http://good:1"]
    assert list(report.failed) == ["http://bad:1"] and "out of order" in report.failed["http://bad:1"]
    assert "left out http://bad:1" in report.line()
    assert good.label == 2 and not good.is_paused
    trainer.check_held(good)
    del bad.before[call]
    bad.weights.clear()
    bad.calls.clear()
    report = trainer.push(3)
    assert report.synced == ["http://bad:1", "http://good:1"] and "init" in bad.calls
    trainer.check_held(bad)


def test_a_server_whose_nccl_does_not_connect_is_named_before_the_group_is_made_and_left_out_if_that_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = StandIn("http://old:1"), StandIn("http://new:1")
    old.change(version="0.5.18")
    new.change(version="0.5.23.post1")
    monkeypatch.setattr(WeightSync, "_uses_nccl", True)
    monkeypatch.setattr(push, "own_pair", lambda: Pair("2.14", "2.30.7"))
    join, groups = push.UpdateGroup, []

    def as_nccl(servers: list[StandIn], *args: Any, **options: Any) -> Any:
        groups.append([server.url for server in servers])
        if old in servers:
            raise GroupFailure("joining the update group failed (NCCL error: Mismatched NCCL version)", {})
        return join(servers, *args, **options)

    monkeypatch.setattr(push, "UpdateGroup", as_nccl)
    trainer = Trainer([old, new])
    report = trainer.push(1)
    assert groups == [[old.url, new.url], [new.url]]
    assert report.synced == [new.url]
    assert "NCCL 2.29.7" in report.failed[old.url] and "SGLang 0.5.22 to 0.5.23" in report.failed[old.url]
    (note,) = report.notes
    assert note.startswith(f"rollout server {old.url}: SGLang 0.5.18 comes with torch 2.13 and NCCL 2.29.7")
    assert not trainer.push(2).notes, "once a run"


def test_a_server_of_an_unknown_version_is_named_once_and_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    server = StandIn("http://a:1")
    server.change(version="0.6.0")
    monkeypatch.setattr(WeightSync, "_uses_nccl", True)
    monkeypatch.setattr(push, "own_pair", lambda: Pair("2.14", "2.30.7"))
    trainer = Trainer([server])
    report = trainer.push(1)
    assert report.synced == [server.url]
    (note,) = report.notes
    assert "SGLang 0.6.0 is not in the table of docs/servers.md" in note
    server.restart()
    assert not trainer.push(2).notes


def test_a_restarted_server_gets_a_new_group() -> None:
    server, other = StandIn("http://a:1"), StandIn("http://b:1")
    trainer = Trainer([server, other])
    trainer.push(1)
    server.restart()
    report = trainer.push(2)
    assert report.num_attempts == 1 and len(report.synced) == 2, report.line()
    trainer.check_held(server)


def test_one_that_was_gone_at_a_sync_and_restarted_gets_one_too() -> None:
    server = StandIn("http://a:1")
    trainer = Trainer([server])
    trainer.push(1)
    server.restart()
    server.before["probe"] = lambda: server.fail("cannot be reached", None)
    assert not trainer.push(2).synced
    del server.before["probe"]
    report = trainer.push(3)
    assert report.synced and report.num_attempts == 1, report.line()


def test_a_label_that_is_not_the_new_one_is_a_failure() -> None:
    server = StandIn("http://a:1")
    server.before["weight_version"] = lambda: setattr(server, "label", 3)
    report = Trainer([server]).push(4)
    assert not report.synced and "step 3, it was sent 4" in report.failed["http://a:1"]
    assert server.is_paused, "it would generate with who knows what"


def test_all_servers_gone_is_a_report_too() -> None:
    server = StandIn("http://a:1")
    server.before["probe"] = lambda: server.fail("cannot be reached", None)
    report = Trainer([server]).push(1)
    assert (
        report.synced == []
        and report.failed == {"http://a:1": "cannot be reached"}
        and report.num_attempts == 0
    )
    assert Trainer([]).push(1).synced == []


def test_proofs_come_first_after_failures_and_every_n() -> None:
    server = StandIn("http://a:1")
    server.change(has_weights_checker=True)
    trainer = Trainer([server], sync_proof_interval=3)
    failed = trainer.push(1)
    assert "checksums of 0 ranks" in failed.failed["http://a:1"]
    server.before["checksums"] = lambda: setattr(server, "held", checksums_of(server))
    proofs = [bool(trainer.push(version).proof) for version in range(2, 10)]
    assert proofs == [True, False, False, True, False, False, True, False]
    off = Trainer([server], sync_proof="off")
    assert off.push(10).proof == ""


def checksums_of(server: StandIn) -> list[dict[str, str]]:
    """Of what the stand-in holds, by the formula of SGLang's checker."""
    found: dict[str, Any] = {}
    for name, tensor in server.weights.items():
        fused = re.sub(r"\b[qkv]_proj", "qkv_proj", re.sub(r"\b(gate|up)_proj", "gate_up_proj", name))
        raw = tensor.view(torch.uint8).numpy().tobytes()
        if "embed_tokens" in name:
            raw += bytes(24 * 128 * 2)
        found[fused] = found.get(fused, b"") + raw
    return [{name: hashlib.sha256(raw).digest()[:8].hex() for name, raw in found.items()}]


def test_values_are_read_back_where_asked() -> None:
    server = StandIn("http://a:1")
    server.before["read"] = lambda: server.rows.update(
        {name: tensor.float().tolist() for name, tensor in server.weights.items()}
    )
    report = Trainer([server], sync_proof="read_back").push(1)
    assert report.synced and report.proof == "reading values back" and server.calls.count("read") > 2


def test_fp8_servers_get_fp8() -> None:
    server = StandIn("http://a:1")
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["layers.1"]}
    server.change(model_config={**CONFIG, "quantization_config": fp8})
    trainer = Trainer([server])
    assert trainer.push(1).synced
    name = "model.layers.0.mlp.up_proj.weight"
    whole = server.weights[name].float() * server.weights[name + "_scale_inv"].repeat_interleave(
        128, 0
    ).repeat_interleave(128, 1)
    assert torch.allclose(whole, trainer.weights[name], rtol=0.08, atol=0.02)
    kept = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(server.weights[kept], trainer.weights[kept].to(torch.bfloat16))


UNFIT = [
    ({"dp_size": 2}, "without --dp"),
    ({"pp_size": 2}, "without --dp and --pp"),
    ({"architectures": ("LlamaForCausalLM",)}, "a LlamaForCausalLM; this run trains a Qwen2"),
    ({"model_config": {"hidden_size": 32}}, "hidden_size 32; this run trains a model with 64"),
    ({"quantization": "fp8"}, "--quantization fp8"),
    ({"dtype": "int8"}, "keeps its weights as int8"),
    ({"model_config": {"quantization_config": {"quant_method": "gptq"}}}, "gptq"),
]


@pytest.mark.parametrize(("change", "says"), UNFIT)
def test_a_server_that_cannot_be_fed_is_refused_with_the_way_out(change: dict[str, Any], says: str) -> None:
    server = StandIn("http://a:1")
    server.change(**change)
    with pytest.raises(ValueError, match=rf"rollout server http://a:1 .*{says}"):
        Trainer([server]).push(1)


@pytest.mark.parametrize(
    ("change", "says"), [*UNFIT, ({"dtype": "float16"}, "it wants float16, they bfloat16")]
)
def test_one_that_joins_a_run_is_left_out_and_the_others_go_on(change: dict[str, Any], says: str) -> None:
    good, late = StandIn("http://a:1"), StandIn("http://b:1")
    trainer = Trainer([good])
    trainer.push(1)
    late.change(**change)
    trainer.servers = {late.url: late, good.url: good}
    trainer.sync._connect = trainer.servers.__getitem__  # type: ignore[assignment]
    for version in (2, 3):
        good.calls.clear()
        report = trainer.push(version)
        assert report.synced == ["http://a:1"] and says in report.failed["http://b:1"]
        assert good.label == version and not good.is_paused and not good.is_open
        assert "init" not in good.calls, "its group is as good as before"
    assert set(late.calls) == {"probe"}, "it was not even paused"


def test_a_run_whose_only_server_cannot_be_fed_any_more_gets_a_report() -> None:
    server = StandIn("http://a:1")
    trainer = Trainer([server])
    trainer.push(1)
    server.change(dp_size=2)
    report = trainer.push(2)
    assert report.synced == [] and "without --dp" in report.failed["http://a:1"]


def test_what_most_servers_want_is_sent_at_first_and_what_was_sent_later() -> None:
    servers = [StandIn(f"http://{name}:1") for name in "abcd"]
    for server in servers[:2]:
        server.change(model_config={"dtype": "float16"})
    trainer = Trainer(servers[1:])
    trainer.sync._connect = {server.url: server for server in servers}.__getitem__  # type: ignore[assignment]
    report = trainer.push(1)
    assert report.synced == ["http://c:1", "http://d:1"] and "serve the same folder" in report.line().lower()
    report = trainer.sync.push(2, [server.url for server in servers[:3]])
    assert report.synced == ["http://c:1"] and list(report.failed) == ["http://a:1", "http://b:1"]


def test_sleeping_servers_are_woken_weights_first() -> None:
    server = StandIn("http://a:1")
    trainer = Trainer([server], sync_method="tensor")
    trainer.push(1)
    server.calls.clear()
    assert trainer.sync.sleep(["http://a:1"]) == {}
    trainer.push(2)
    wanted = [
        "release weights kv_cache",
        "resume weights",
        "begin",
        "end",
        "resume kv_cache",
        "flush",
        "resume",
    ]
    assert [call for call in server.calls if call in wanted] == wanted
    server.calls.clear()
    trainer.push(3)
    assert "resume weights" not in server.calls


class Sleeper(StandIn):
    """Ends, as SGLang does, where it shall take back what it has."""

    released: set[str]

    def release_memory(self, tags: Any = None, deadline_s: float | None = None) -> None:
        super().release_memory(tags)
        self.released = self.released | set(tags)

    def resume_memory(self, tags: Any = None, deadline_s: float | None = None) -> None:
        super().resume_memory(tags)
        if not self.released >= set(tags):
            self.fail("KeyError", None)
        self.released = self.released - set(tags)

    def update_weights_from_tensor(self, serialized: Any, **_: Any) -> None:
        super().update_weights_from_tensor(serialized)
        assert "weights" not in self.released, "written into memory that is not there"


@pytest.fixture
def sleepers() -> tuple[Trainer, Sleeper, Sleeper]:
    one, two = Sleeper("http://a:1"), Sleeper("http://b:1")
    trainer = Trainer([one, two], sync_method="tensor")
    one.released = two.released = set()
    trainer.push(1)
    assert trainer.sync.sleep(["http://a:1", "http://b:1"]) == {}
    return trainer, one, two


def test_memory_is_taken_back_once_however_often_a_sync_is_tried(
    sleepers: tuple[Trainer, Sleeper, Sleeper],
) -> None:
    trainer, bad, good = sleepers
    bad.before["tensor"] = lambda: bad.fail("out of order")
    report = trainer.push(2)
    assert report.synced == ["http://b:1"] and report.num_attempts == 2
    assert list(report.failed) == ["http://a:1"] and "out of order" in report.failed["http://a:1"]
    assert good.calls.count("resume weights") == 1 and not good.released
    assert bad.released == {"kv_cache"}
    del bad.before["tensor"]
    assert trainer.push(3).synced == ["http://a:1", "http://b:1"] and not bad.released


@pytest.mark.parametrize("tag", ["weights", "kv_cache"])
def test_one_that_did_not_wake_is_not_taken_for_awake(
    tag: str, sleepers: tuple[Trainer, Sleeper, Sleeper]
) -> None:
    trainer, late, _ = sleepers
    late.before[f"resume {tag}"] = lambda: late.fail("gave no answer within 20 s", None)
    assert trainer.push(2).synced == ["http://b:1"]
    del late.before[f"resume {tag}"]
    assert trainer.push(3).synced == ["http://a:1", "http://b:1"] and not late.released


def test_one_that_was_restarted_is_awake(sleepers: tuple[Trainer, Sleeper, Sleeper]) -> None:
    trainer, server, _ = sleepers
    server.restart()
    server.released = set()
    server.calls.clear()
    assert trainer.push(2).synced == ["http://a:1", "http://b:1"]
    assert "resume weights" not in server.calls and "resume kv_cache" not in server.calls


def test_one_that_failed_half_awake_goes_back_to_sleep_whole(
    sleepers: tuple[Trainer, Sleeper, Sleeper],
) -> None:
    trainer, bad, good = sleepers
    bad.before["tensor"] = lambda: bad.fail("out of order")
    trainer.push(2)
    assert bad.released == {"kv_cache"} and not good.released
    bad.calls.clear()
    assert trainer.sync.sleep(["http://a:1", "http://b:1"]) == {}
    assert bad.released == good.released == {"weights", "kv_cache"}
    assert "release weights" in bad.calls, "what it has released it is not asked for again"
    del bad.before["tensor"]
    assert trainer.push(3).synced == ["http://a:1", "http://b:1"]
    assert not bad.released and not good.released


@pytest.mark.parametrize("awake", [[], ["weights"], ["weights", "kv_cache"]], ids=["asleep", "half", "awake"])
def test_the_next_run_wakes_whom_a_killed_one_left_asleep(
    awake: list[str], sleepers: tuple[Trainer, Sleeper, Sleeper]
) -> None:
    killed, one, two = sleepers
    killed.sync._take_back(one, *awake)
    trainer = Trainer([one, two], sync_method="tensor")
    assert trainer.push(1).synced == ["http://a:1", "http://b:1"]
    assert not one.released and not two.released and not one.is_paused


def test_a_server_that_slept_is_proven_no_more_often_than_others(
    sleepers: tuple[Trainer, Sleeper, Sleeper],
) -> None:
    trainer, *_ = sleepers
    group = trainer.sync._members_group
    trainer.push(2)
    assert trainer.sync._members_group == group and trainer.sync._syncs_since_proof == 1


def test_a_run_wakes_whom_it_leaves(sleepers: tuple[Trainer, Sleeper, Sleeper]) -> None:
    trainer, gone, server = sleepers
    gone.before["resume weights"] = lambda: gone.fail("cannot be reached", None)
    assert trainer.sync.wake() == {"http://a:1": "cannot be reached"}
    assert not server.released and server.is_paused, "its weights are undefined"
    server.calls.clear()
    trainer.sync.wake()
    assert server.calls == []


def test_the_disk_keeps_two_versions(tmp_path: Path) -> None:
    def export(path: str) -> None:
        Path(path).mkdir(parents=True)
        (Path(path) / "model.safetensors").write_bytes(b"x" * 10)

    server = StandIn("http://a:1")
    trainer = Trainer([server], sync_method="disk", sync_disk_folder=str(tmp_path / "disk"), export=export)
    for version in (1, 2, 3):
        report = trainer.push(version)
        assert report.synced and report.num_bytes == 10
    left = sorted(path.name for path in (tmp_path / "disk").iterdir())
    assert [name[:16] for name in left] == ["weights-00000002", "weights-00000003"]
    loaded = [call.split()[1] for call in server.calls if call.startswith("disk")]
    assert loaded[-1] == left[-1] and len(loaded) == 3
    assert "begin" not in server.calls


def test_a_server_that_loaded_an_export_keeps_the_type_it_began_with(tmp_path: Path) -> None:
    server = StandIn("http://a:1")
    start = {"model_path": "/models/start", "model_config": {**CONFIG, "dtype": "float16"}}
    server.change(**start, has_weights_checker=True)
    trainer = Trainer(
        [server],
        sync_method="disk",
        sync_disk_folder=str(tmp_path),
        sync_proof_interval=1,
        export=lambda path: Path(path).mkdir(),
    )

    def answer() -> None:
        server.weights = {name: tensor.half() for name, tensor in trainer.weights.items()}
        server.held = checksums_of(server)

    server.before["checksums"] = answer
    for version in (1, 2, 3):
        assert trainer.push(version).proof, "it is held to what its own type makes of the weights"
        exported = {
            "model_path": str(max(tmp_path.iterdir())),
            "model_config": {**CONFIG, "dtype": "bfloat16"},
        }
        server.change(**exported)
    server.change(**{**start, "model_config": {**CONFIG, "dtype": "bfloat16"}})  # restarted
    assert "does not hold" in trainer.push(4).failed["http://a:1"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"sync_method": "disk", "sync_disk_folder": "there", "export": print}, "--sync-method broadcast"),
        ({"sync_proof": "checksum"}, "--sync-proof auto"),
    ],
)
def test_what_does_not_go_with_fp8_servers_is_refused(flags: dict[str, Any], says: str) -> None:
    server = StandIn("http://a:1")
    server.change(model_config={**CONFIG, "quantization_config": quantization_config([])})
    with pytest.raises(ValueError, match=rf"a:1 serves FP8, .* {says}"):
        Trainer([server], **flags).push(1)


def test_checksums_on_a_gpu_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--sync-proof checksum .* Use --sync-proof auto"):
        WeightSync(
            SyncConfig(sync_proof="checksum"),
            plan=list,  # type: ignore[arg-type]
            gather=iter,  # type: ignore[arg-type]
            connect=StandIn,  # type: ignore[arg-type]
            model_config=CONFIG,
            device=torch.device("cuda", 0),
            stage=0,
            num_stages=1,
            takes_part=True,
        )


def test_a_server_on_another_machine_is_given_no_handle_of_a_gpu() -> None:
    near, far = StandIn("http://127.0.0.1:1"), StandIn("http://192.0.2.1:1")
    trainer = Trainer([near, far], sync_method="tensor")
    assert trainer.push(1).synced == [near.url, far.url], "on a CPU the request holds the bytes"
    trainer.sync._device = torch.device("cuda", 0)
    attempt: Any = SimpleNamespace(servers=((near.url, 1), (far.url, 1)))
    with pytest.raises(GroupFailure, match="use --sync-method broadcast") as caught:
        trainer.sync._sender(attempt)
    assert list(caught.value.servers) == [far.url]


@pytest.mark.parametrize("method", ["tensor", "broadcast"])
def test_servers_on_the_same_gpu_find_the_trainers_cache_empty(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server ends where the memory that it takes back is still in the trainer's allocator."""
    server = StandIn("http://a:1")
    trainer = Trainer([server], sync_method=method)
    trainer.push(1)
    trainer.sync.sleep(["http://a:1"])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: server.calls.append("room"))
    server.calls.clear()
    trainer.push(2)
    taken_back = [call for call in server.calls if call == "room" or call.startswith("resume ")]
    expected = ["room", "resume weights", "room", "resume kv_cache"]
    assert taken_back == (expected if method == "tensor" else ["resume weights", "resume kv_cache"])


def test_disk_without_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--sync-method disk"):
        Trainer([], sync_method="disk", sync_disk_folder=str(tmp_path))


def test_what_a_sync_takes_is_said_beforehand() -> None:
    text = Trainer([]).sync.describe()
    assert "up to 2 MiB" in text and "--sync-bucket-mib" not in text
    large = Trainer([])
    large.weights["model.embed_tokens.weight"] = torch.randn(40_000, 128)
    large.sync._plan = lambda *, dtypes=None: [  # type: ignore[method-assign, assignment]
        Planned(n, tuple(t.shape), (dtypes or {}).get(n, torch.float32)) for n, t in large.weights.items()
    ]
    assert (
        "model.embed_tokens.weight and what belongs to it are 10 MiB, above --sync-bucket-mib 1"
        in large.sync.describe()
    )


def test_a_port_in_use_is_the_users_affair() -> None:
    server = StandIn("http://a:1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match="--sync-port"):
            Trainer([server], sync_port=taken.getsockname()[1]).push(1)


def test_an_address_of_another_machine_is_refused_at_once() -> None:
    elsewhere = "192.0.2.1"
    with pytest.raises(
        ValueError, match=rf"{elsewhere} is no address of {socket.gethostname()}.* stage 0 .*-interface"
    ):
        Trainer([], sync_address=elsewhere)
    Trainer([], sync_address=elsewhere, sync_method="tensor")  # nobody connects
