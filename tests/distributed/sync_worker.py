"""One rank of test_sync.py: trainers of several layouts sync to real servers, whose weights are then compared.

Usage: sync_worker.py RANK WORLD_SIZE ROOT, where ROOT/job.json holds the job:

    {"task": "layouts" | "faults", "model": folder, "urls": [...], "victim": url,
     "layouts": [[tp, pp, vpp, ep, expert tp], ...]}
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rasft.machine import cpu_backend

cpu_backend.enable()

from megatron.core import parallel_state as ps  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402

from megatron_rasft.config.sync import SyncConfig  # noqa: E402
from megatron_rasft.servers.client import ServerClient  # noqa: E402
from megatron_rasft.servers.record import ServerRecords  # noqa: E402
from megatron_rasft.sync import SyncReport, WeightSync  # noqa: E402
from megatron_rasft.weights.exporting import export  # noqa: E402
from megatron_rasft.weights.folder import HfFolder  # noqa: E402
from megatron_rasft.weights.gathering import ExpertGroups  # noqa: E402
from megatron_rasft.weights.loading import load_into  # noqa: E402
from tests.chunk_tensors import ChunkTensors  # noqa: E402
from tests.tiny_models import build_chunks  # noqa: E402

PADDED_VOCAB_SIZE = 128
BUCKET_MIB = 1
"""Size of a bucket. It is small, so that the tiny model needs several buckets."""
PROMPT = [5, 17, 3, 88, 41]


class SyncedModel:
    """A tiny model in one layout, and its weight sync."""

    def __init__(
        self, folder: HfFolder, vpp: int | None, config: SyncConfig, connect: Any = ServerClient
    ) -> None:
        self.folder = folder
        self.chunks, self.offsets = build_chunks(folder, PADDED_VOCAB_SIZE, vpp)
        self.tp_group = ps.get_tensor_model_parallel_group()
        self.experts = ExpertGroups(
            ps.get_expert_model_parallel_group(),
            ps.get_expert_tensor_parallel_group(),
            ps.get_expert_data_parallel_rank() == 0,
        )
        load_into(
            self.chunks,
            folder,
            tp_rank=self.tp_group.rank(),
            tp_size=self.tp_group.size(),
            layer_offsets=self.offsets,
            pp_group=ps.get_pipeline_model_parallel_group(),
            experts=self.experts.ranks,
        )
        self.tensors = ChunkTensors(
            chunks=self.chunks,
            folder=folder,
            layer_offsets=self.offsets,
            tp_group=self.tp_group,
            experts=self.experts,
            is_first_replica=ps.get_data_parallel_rank(with_context_parallel=True) == 0,
            stage=ps.get_pipeline_model_parallel_rank(),
            num_stages=ps.get_pipeline_model_parallel_world_size(),
        )
        self.sync = WeightSync(
            config,
            self.tensors,
            records=ServerRecords(connect=connect),
            model_config=folder.config,
            device=torch.device("cpu"),
            export=self.export,
        )

    def change(self, times: int = 1) -> None:
        """Changes the weights, in the same way for every layout."""
        with torch.no_grad():
            for chunk in self.chunks:
                for param in chunk.parameters():
                    param.mul_((-0.9375) ** times)

    def export(self, path: str) -> None:
        export(self.tensors, self.folder, path)


@contextmanager
def layout(tp: int, pp: int, vpp: int | None = None, ep: int = 1, etp: int | None = None) -> Iterator[None]:
    ps.initialize_model_parallel(
        tp,
        pp,
        virtual_pipeline_model_parallel_size=vpp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    model_parallel_cuda_manual_seed(123)
    yield
    ps.destroy_model_parallel()


def generated(url: str) -> list[Any]:
    """Returns greedy tokens and their log-probabilities."""
    body = {
        "input_ids": PROMPT,
        "sampling_params": {"max_new_tokens": 6, "temperature": 0.0, "ignore_eos": True},
        "return_logprob": True,
    }
    with ServerClient(url) as server:
        meta = server.generate(body)["meta_info"]
    values = [value[:2] for value in meta["output_token_logprobs"]]
    assert len(values) == 6, values
    return values


def held(url: str) -> list[dict[str, str]]:
    with ServerClient(url) as server:
        return server.checksums()


def check_layouts(job: dict[str, Any], root: Path) -> None:
    folder = HfFolder.open(job["model"])
    for version, sizes in enumerate(job["layouts"], 1):
        with layout(*sizes):
            model = SyncedModel(folder, sizes[2], SyncConfig(sync_bucket_mib=BUCKET_MIB, sync_timeout_s=600))
            model.change(2 * version - 1)
            push_and_compare(model, job["urls"], version, root / f"export-{version}")
            # this sync uses the same groups
            model.change()
            report = model.sync.push(version + 100, job["urls"])
            assert report.proof == "" and report.synced == job["urls"], report.line()
            model.sync.close()
    with layout(2, 1):
        for times, method in ((1, "tensor"), (3, "disk")):
            config = SyncConfig(
                sync_bucket_mib=BUCKET_MIB,
                sync_timeout_s=600,
                sync_method=method,
                sync_disk_folder=str(root / "disk"),
                sync_pause_mode="retract",
            )
            model = SyncedModel(folder, None, config)
            model.change(times)
            push_and_compare(model, job["urls"], 200 + times, root / f"export-{method}")
            model.sync.close()


def push_and_compare(model: SyncedModel, urls: list[str], version: int, exported: Path) -> None:
    """Checks that a sync leaves the servers with the same bits as loading the exported folder from disk."""
    before = [generated(url) for url in urls] if dist.get_rank() == 0 else []
    report = model.sync.push(version, urls)
    assert report.synced == urls and not report.failed, report.line()
    assert report.proof.startswith("checksums"), report.line()
    model.export(str(exported))
    if dist.get_rank() == 0:
        print(report.line(), flush=True)
        for url, old in zip(urls, before, strict=True):
            with ServerClient(url) as server:
                assert server.weight_version() == version
                by_push, new = server.checksums(), generated(url)
                server.pause("abort")
                server.update_weights_from_disk(exported)
                server.resume()
                assert server.checksums() == by_push, f"{url}: differs from the exported folder"
            assert generated(url) == new != old
    dist.barrier()


def check_faults(job: dict[str, Any], root: Path) -> None:
    """Freezes and kills a server during a sync: it is named and left out, and has all weights after the next sync."""
    victim, other = job["victim"], next(u for u in job["urls"] if u != job["victim"])
    strike = {"what": "", "calls": 0}

    class FailingClient(ServerClient):
        """Acts on the victim when it is sent its third bucket."""

        def update_weights_from_distributed(self, **values: Any) -> None:
            if self.url == victim:
                strike["calls"] += 1
                if strike["calls"] == 3 and strike["what"]:
                    ask(root, strike["what"])
            super().update_weights_from_distributed(**values)

    def push(version: int, what: str = "") -> SyncReport:
        strike.update(what=what, calls=0)
        model.change()
        report = model.sync.push(version, job["urls"])
        if dist.get_rank() == 0:
            print(report.line(), flush=True)
        return report

    def check_left_out(report: SyncReport, version: int) -> None:
        assert report.synced == [other] and list(report.failed) == [victim], report.line()
        assert report.num_attempts == 2 and report.proof.startswith("checksums"), report.line()
        if dist.get_rank() == 0:
            with ServerClient(other) as server:
                assert server.weight_version() == version
            assert generated(other)

    with layout(2, 1):
        config = SyncConfig(sync_bucket_mib=BUCKET_MIB, sync_timeout_s=job["timeout_s"])
        model = SyncedModel(HfFolder.open(job["model"]), None, config, FailingClient)
        assert push(1).synced == job["urls"]
        check_left_out(push(2, "freeze"), 2)
        ask_once(root, "thaw")
        report = push(3)
        assert report.synced == job["urls"] and report.proof, report.line()
        check_left_out(push(4, "kill"), 4)
        ask_once(root, "restart")
        report = push(5)
        assert report.synced == job["urls"] and report.proof, report.line()
        if dist.get_rank() == 0:
            assert held(victim) == held(other)
        model.sync.close()


def ask_once(root: Path, what: str) -> None:
    if dist.get_rank() == 0:
        ask(root, what)
    dist.barrier()


def ask(root: Path, what: str) -> None:
    """Makes the test, which owns the servers, act on the victim. Returns after the action."""
    (root / f"{what}.wanted").touch()
    while not (root / f"{what}.done").exists():
        time.sleep(0.05)


def main(rank: int, world_size: int, root: Path) -> None:
    torch.set_num_threads(1)
    job = json.loads((root / "job.json").read_text())
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=world_size)
    (check_layouts if job["task"] == "layouts" else check_faults)(job, root)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
