"""Complete syncs of one rank to servers in this process: the weights arrive, and failures of the transfer leave servers out."""

import hashlib
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rasft import metrics
from megatron_rasft.config import SyncConfig
from megatron_rasft.sync import WeightSync, streaming
from megatron_rasft.sync.buckets import Arena
from megatron_rasft.tools.conversion.fp8_folders import quantization_config
from tests.unit.sync.stand_ins import StandIn, records_of
from tests.unit.sync.test_buckets import Planned, model
from tests.unit.sync.test_session import CONFIG


class Trainer:
    """Random weights, and a sync of them to stand-ins."""

    stage = 0
    num_stages = 1
    takes_part = True

    def __init__(self, *servers: StandIn, export: Any = None, vocab: int = 1000, **flags: Any) -> None:
        self.urls = [server.url for server in servers]
        torch.manual_seed(2)
        self.tensors = model(hidden=128, vocab=vocab)
        self.weights = {t.name: torch.randn(t.shape) for t in self.tensors}
        self.sync = WeightSync(
            SyncConfig(
                **{"sync_bucket_mib": 1, "sync_timeout_s": 600.0, "sync_address": "127.0.0.1", **flags}
            ),
            self,
            records=records_of(*servers),
            model_config=CONFIG,
            device=torch.device("cpu"),
            export=export,
        )

    def plan(self, *, dtypes: dict[str, torch.dtype] | None = None) -> list[Planned]:
        return [t._replace(dtype=(dtypes or {}).get(t.name, torch.float32)) for t in self.tensors]

    def gather(
        self, *, dtypes: dict[str, torch.dtype], out: Callable[[str], Tensor | None]
    ) -> Iterator[tuple[str, Tensor | None]]:
        for name, tensor in self.weights.items():
            memory = out(name)
            yield name, tensor.to(dtypes[name]) if memory is None else memory.copy_(tensor)

    def push(self, version: int) -> Any:
        return self.sync.push(version, self.urls)

    def check_held(self, server: StandIn) -> None:
        assert set(server.weights) == set(self.weights)
        for name, tensor in self.weights.items():
            assert torch.equal(server.weights[name], tensor.to(torch.bfloat16)), name


def test_a_sync_sends_every_tensor_over_a_group_that_is_kept() -> None:
    server = StandIn("http://a:1")
    trainer = Trainer(server)
    report = trainer.push(7)
    assert report.synced == ["http://a:1"] and not report.failed and report.num_attempts == 1
    trainer.check_held(server)
    assert [call for call in server.calls if call != "update"] == [
        "probe", "pause abort", "begin", "init", "end", "flush", "label", "weight_version", "resume",
    ]  # fmt: skip
    assert server.calls.count("update") == report.num_buckets > 1
    assert report.num_bytes == sum(2 * t.numel() for t in trainer.weights.values())
    assert report.values()[metrics.SYNC_SERVERS] == 1 and "step 7 on 1 server " in report.line()
    transfer = trainer.sync.transfer
    assert transfer.num_sent_bytes == transfer.num_bytes == report.num_bytes
    server.calls.clear()
    trainer.push(8)
    assert transfer.num_sent_bytes == 2 * report.num_bytes
    assert "init" not in server.calls
    trainer.sync.close()
    assert server.calls[-1] == "destroy"


def test_the_memory_is_kept_for_the_next_sync_unless_a_sync_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counted(Arena):
        def __init__(self, num_bytes: int, device: torch.device, is_shared: bool) -> None:
            super().__init__(num_bytes, device, is_shared)
            made.append(num_bytes)

    monkeypatch.setattr(streaming, "Arena", Counted)
    server = StandIn("http://a:1")
    trainer = Trainer(server)
    reports = [trainer.push(version) for version in range(3)]
    assert len(made) == 1
    assert all(report.peak_bytes >= made[0] for report in reports[1:]), "kept memory counts too"
    server.before["update"] = lambda: server.fail("out of order")
    assert not trainer.push(3).synced
    del server.before["update"]
    trainer.push(4)
    trainer.check_held(server)
    assert len(made) == 2, "the broadcast that was given up may still have read the first"


@pytest.mark.parametrize("call", ["init", "update", "end"])
def test_a_server_that_fails_is_left_out_and_gets_a_full_sync_over_a_new_group_later(call: str) -> None:
    bad, good = StandIn("http://bad:1"), StandIn("http://good:1")
    trainer = Trainer(bad, good)
    trainer.push(1)
    if call == "init":
        bad.restart()  # otherwise the sync would not create a new group
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


def test_a_restarted_server_is_synced_in_one_attempt() -> None:
    server, other = StandIn("http://a:1"), StandIn("http://b:1")
    trainer = Trainer(server, other)
    trainer.push(1)
    server.restart()
    report = trainer.push(2)
    assert report.num_attempts == 1 and len(report.synced) == 2, report.line()
    trainer.check_held(server)


def test_a_tensor_sync_sends_requests() -> None:
    server = StandIn("http://a:1")
    report = Trainer(server, sync_method="tensor").push(1)
    assert report.synced and server.calls.count("tensor") == report.num_buckets
    assert "init" not in server.calls


def test_proofs_come_first_after_failures_and_every_n() -> None:
    server = StandIn("http://a:1")
    server.change(has_weights_checker=True)
    trainer = Trainer(server, sync_proof_interval=3)
    assert trainer.push(1).failed, "it has no checksums"
    server.before["checksums"] = lambda: setattr(server, "held", checksums_of(server))
    proofs = [bool(trainer.push(version).proof) for version in range(2, 10)]
    assert proofs == [True, False, False, True, False, False, True, False]


def checksums_of(server: StandIn) -> list[dict[str, str]]:
    """Returns the checksums of a stand-in's weights, calculated with the formula of SGLang's checker."""
    found: dict[str, Any] = {}
    for name, tensor in server.weights.items():
        fused = re.sub(r"\b[qkv]_proj", "qkv_proj", re.sub(r"\b(gate|up)_proj", "gate_up_proj", name))
        raw = tensor.view(torch.uint8).numpy().tobytes()
        if "embed_tokens" in name:
            raw += bytes(24 * 128 * 2)
        found[fused] = found.get(fused, b"") + raw
    return [{name: hashlib.sha256(raw).digest()[:8].hex() for name, raw in found.items()}]


def test_values_are_read_back_if_asked_for() -> None:
    server = StandIn("http://a:1")
    server.before["read"] = lambda: server.rows.update(
        {name: tensor.float().tolist() for name, tensor in server.weights.items()}
    )
    report = Trainer(server, sync_proof="read_back").push(1)
    assert report.synced and report.proof == "reading values back" and server.calls.count("read") > 2


def test_fp8_servers_get_fp8() -> None:
    server = StandIn("http://a:1")
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["layers.1"]}
    server.change(model_config={**CONFIG, "quantization_config": fp8})
    trainer = Trainer(server)
    assert trainer.push(1).synced
    name = "model.layers.0.mlp.up_proj.weight"
    whole = server.weights[name].float() * server.weights[name + "_scale_inv"].repeat_interleave(
        128, 0
    ).repeat_interleave(128, 1)
    assert torch.allclose(whole, trainer.weights[name], rtol=0.08, atol=0.02)
    kept = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(server.weights[kept], trainer.weights[kept].to(torch.bfloat16))


def test_servers_that_load_an_export_are_proven_against_the_weights(tmp_path: Path) -> None:
    server = StandIn("http://a:1")
    server.change(
        model_path="/models/start", model_config={**CONFIG, "dtype": "float16"}, has_weights_checker=True
    )
    trainer = Trainer(
        server,
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
        assert trainer.push(version).proof
        server.change(model_path=str(max(tmp_path.iterdir())))
    assert [call.partition(" ")[0] for call in server.calls].count("disk") == 3
    server.change(model_path="/models/start", model_config={**CONFIG, "dtype": "bfloat16"})  # restarted
    report = trainer.push(4)
    assert not report.synced and not report.proof


def test_checksums_on_a_gpu_are_refused() -> None:
    with pytest.raises(ValueError, match="--sync-proof checksum"):
        WeightSync(
            SyncConfig(sync_proof="checksum"),
            object(),
            records=records_of(),
            model_config=CONFIG,
            device=torch.device("cuda", 0),
        )


@pytest.mark.parametrize("method", ["tensor", "broadcast"])
def test_the_trainers_cached_gpu_memory_is_freed_before_servers_take_theirs_back(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = StandIn("http://a:1")
    trainer = Trainer(server, sync_method=method)
    trainer.push(1)
    trainer.sync.sleep(["http://a:1"])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: server.calls.append("freed"))
    server.calls.clear()
    trainer.push(2)
    taken_back = [call for call in server.calls if call == "freed" or call.startswith("resume ")]
    expected = ["freed", "resume weights", "freed", "resume kv_cache"]
    assert taken_back == (expected if method == "tensor" else ["resume weights", "resume kv_cache"])


def test_disk_without_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--sync-method disk"):
        Trainer(sync_method="disk", sync_disk_folder=str(tmp_path))


def test_the_memory_of_a_sync_is_described_beforehand() -> None:
    text = Trainer().sync.describe()
    assert "2 MiB" in text and "--sync-bucket-mib" not in text
    text = Trainer(vocab=40_000).sync.describe()
    assert "model.embed_tokens.weight" in text and "10 MiB" in text and "--sync-bucket-mib 1" in text


def test_a_port_in_use_is_an_error_of_the_user() -> None:
    server = StandIn("http://a:1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match="--sync-port"):
            Trainer(server, sync_port=taken.getsockname()[1]).push(1)


def test_an_address_of_another_machine_is_refused_at_once() -> None:
    elsewhere = "192.0.2.1"
    with pytest.raises(ValueError, match=rf"--sync-address {elsewhere}.*{socket.gethostname()}.*stage 0"):
        Trainer(sync_address=elsewhere)
    Trainer(sync_address=elsewhere, sync_method="tensor")  # servers never connect to this address


def test_fp8_servers_and_disk_are_refused_before_anything_is_exported(tmp_path: Path) -> None:
    server = StandIn("http://a:1")
    server.change(model_config={**CONFIG, "quantization_config": quantization_config([])})
    exported: list[str] = []
    trainer = Trainer(server, sync_method="disk", sync_disk_folder=str(tmp_path), export=exported.append)
    with pytest.raises(ValueError, match="serves FP8"):
        trainer.push(1)
    assert not exported
