"""Compares a weight sync into a real SGLang server on this machine with the bare broadcast of the same bytes, in one run.

python benchmarks/weight_sync.py [--mib 1600] [--bucket-mib 256] [--version 0.5.23] [--no-gather] [--cluster]

Needs `make servers`. Prints one JSON line: seconds and GB/s of the sync and of the bare broadcast of the same buckets,
the peak memory above the steady state, and the estimate for the sync from its parts, each measured alone (by the same function as
for a cluster). With `--no-gather` buckets are sent without gathering weights into them, so only the server causes the difference
between sync and bare broadcast. `--cluster` instead prints the function's estimates for a 70B model on 8 to 64 GPUs, with the
assumed speeds.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_rasft.config import SyncConfig  # noqa: E402
from megatron_rasft.errors import ServerError  # noqa: E402
from megatron_rasft.servers.client import ServerClient  # noqa: E402
from megatron_rasft.servers.record import ServerRecords  # noqa: E402
from megatron_rasft.sync import WeightSync  # noqa: E402
from megatron_rasft.tools.capacity.sync_time import SyncCosts, estimate_sync  # noqa: E402
from megatron_rasft.tools.ports import free_port  # noqa: E402

MIB = 2**20

CLUSTER = SyncCosts(
    gather=100e9,
    network=20e9,
    load=1000e9,
    request_s=0.010,
    control_s=0.5,
)
"""Assumed for H100 nodes: 80 % of half a 400 Gb/s card per sender (25 of 50 GB/s), NVLink gathers at a quarter
of its 450 GB/s, a copy in HBM at a third of its 3.35 TB/s, the request as measured on a quiet CPU."""


def write_model(path: Path, mib: int) -> None:
    """Writes a random Llama in bf16 of about this size, made of layers with Llama-3.2-1B's shape."""
    import transformers

    layer_bytes = 2 * (2 * 2048 * (2048 + 512) + 3 * 2048 * 8192)
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=max(1, round(mib * MIB / layer_bytes)),
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=256,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)


@contextmanager
def server(version: str, model: Path, log: Path) -> Iterator[str]:
    """Runs a real server; kills it at the end of the block."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(ROOT / f".venv-sglang-{version}/bin/python"), str(ROOT / "tools/sglang_on_cpu.py")]
    command += ["--model-path", str(model), "--port", str(port), "--skip-tokenizer-init", "--sleep-on-idle"]
    command += ["--nccl-port", str(free_port())]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        with ServerClient(url) as control:
            ends = time.monotonic() + 400
            while True:
                try:
                    control.weight_label(deadline_s=5)
                    control.checksums(deadline_s=60)
                    break
                except ServerError:
                    if process.poll() is not None or time.monotonic() > ends:
                        sys.exit(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")
                    time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def receive(port: int, sizes: list[int], rounds: int) -> None:
    """Receives the bare broadcast in another process."""
    torch.set_num_threads(1)
    group = bare_group(port, 1)
    buffer = torch.empty(max(sizes), dtype=torch.uint8)
    broadcast(group, buffer)
    for _ in range(rounds):
        for size in sizes:
            broadcast(group, buffer[:size])


def bare_group(port: int, rank: int) -> Any:
    """Creates a gloo group of two processes."""
    timeout = timedelta(seconds=300)
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False, timeout=timeout)
    return dist.ProcessGroupGloo(store, rank, 2, timeout)


def broadcast(group: Any, tensor: torch.Tensor) -> None:
    """Broadcasts from rank 0 and waits for the end."""
    options = dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    group.broadcast([tensor], options).wait()


def bare_seconds(sizes: list[int], rounds: int) -> list[float]:
    """Measures the seconds of each round of broadcasting buckets of these sizes to a process that ignores them."""
    port = free_port()
    context = multiprocessing.get_context("spawn")
    receiver = context.Process(target=receive, args=(port, sizes, rounds))
    receiver.start()
    group = bare_group(port, 0)
    buffer = torch.ones(max(sizes), dtype=torch.uint8)
    seconds = []
    broadcast(group, buffer)  # allocates the pages before the measurement
    for _ in range(rounds):
        began = time.perf_counter()
        for size in sizes:
            broadcast(group, buffer[:size])
        seconds.append(time.perf_counter() - began)
    receiver.join()
    return seconds


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measures sync and bare broadcast alternately, so that other load on the machine affects both equally."""
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        write_model(folder, options.mib)
        config = json.loads((folder / "config.json").read_text())
        weights: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= {
                n: t.clone() for n, t in load_file(file).items()
            }  # anonymous memory like parameters, not pages of a mapped file
        weights = in_megatron_order(weights)
        store = dist.FileStore(str(Path(scratch) / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        with server(options.version, folder, Path(scratch) / "server.log") as url:
            sync = WeightSync(
                SyncConfig(sync_bucket_mib=options.bucket_mib, sync_proof_interval=0),
                Weights(weights, copies=not options.no_gather),  # type: ignore[arg-type]
                records=ServerRecords(),
                model_config=config,
                device=torch.device("cpu"),
            )
            proven = sync.push(0, [url])
            reports, bare = [], []
            sizes: list[int] = []
            for round_number in range(options.rounds):
                # without this the C library keeps freed memory, which would be counted as part of the steady state
                ctypes.CDLL(None).malloc_trim(0)
                report = sync.push(round_number + 1, [url])
                assert report.synced, report.line()
                reports.append(report)
                sizes = sizes or [b.num_bytes for b in sync.transfer.memory_plan().buckets]
                bare += bare_seconds(sizes, 1)
            sync.close()
        dist.destroy_process_group()
    median = statistics.median
    # the fastest round of each counts, because other load can only add to a time
    transfer = min(r.seconds["transfer"] for r in reports)
    num_bytes = reports[0].num_bytes
    bare_s = min(bare)
    return {
        "server": f"sglang {options.version}",
        "gb": round(num_bytes / 1e9, 3),
        "buckets": reports[0].num_buckets,
        "bucket_mib": options.bucket_mib,
        "is_gathered": not options.no_gather,
        "sync_s": round(min(r.seconds["total"] for r in reports), 3),
        "transfer_s": round(transfer, 3),
        "transfer_gb_per_s": round(num_bytes / 1e9 / transfer, 3),
        "bare_s": round(bare_s, 3),
        "bare_gb_per_s": round(num_bytes / 1e9 / bare_s, 3),
        "transfer_over_bare_speed": round(bare_s / transfer, 3),
        "of_medians": round(median(bare) / median(r.seconds["transfer"] for r in reports), 3),
        "gather_s": round(median(r.seconds["gather"] for r in reports), 3),
        "send_s": round(median(r.seconds["send"] for r in reports), 3),
        "waited_s": round(median(r.seconds["wait"] for r in reports), 3),
        "peak_memory_mib": round(max(r.peak_bytes for r in reports) / MIB, 1),
        "peak_memory_buckets": round(max(r.peak_bytes for r in reports) / MIB / options.bucket_mib, 2),
        "proven_sync_s": round(proven.seconds["total"], 3),
        "predicted": predict(min(reports, key=lambda r: r.seconds["total"]), bare_s, num_bytes),
    }


def predict(report: Any, bare_s: float, num_bytes: int) -> dict[str, float]:
    """Estimates the sync from its parts, each measured alone: the bare broadcast, the gather, and the rest of a send."""
    rest_s = max(1e-9, report.seconds["send"] - bare_s)
    costs = SyncCosts(
        gather=num_bytes / report.seconds["gather"],
        network=num_bytes / bare_s,
        load=num_bytes / rest_s,
        request_s=0.0,
        control_s=report.seconds["total"] - report.seconds["transfer"],
    )
    total = estimate_sync(num_bytes, report.num_buckets, costs).total_s
    return {"total_s": round(total, 3), "over_measured": round(total / report.seconds["total"], 3)}


def in_megatron_order(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Orders related tensors next to each other, as the trainer's tables do."""

    def place(name: str) -> tuple[int, int]:
        parts = name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else -1 if "embed" in name else 10**6
        order = ("input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "post_", "gate", "up", "down")
        return layer, next((i for i, part in enumerate(order) if part in name), 0)

    return {name: weights[name] for name in sorted(weights, key=place)}


class Weights:
    """Weights that are planned and gathered like those of a model of one rank; with --no-gather without copies into the buckets."""

    stage = 0
    num_stages = 1
    takes_part = True

    def __init__(self, weights: dict[str, torch.Tensor], *, copies: bool) -> None:
        self._weights = weights
        self._copies = copies

    def plan(self, *, dtypes: dict[str, torch.dtype] | None = None) -> list[Any]:
        from megatron_rasft.weights.gathering import TensorPlan

        wanted = dtypes or {}
        return [TensorPlan(n, tuple(t.shape), wanted.get(n, t.dtype)) for n, t in self._weights.items()]

    def gather(self, *, dtypes: dict[str, torch.dtype], out: Any) -> Iterator[Any]:
        for name, tensor in self._weights.items():
            memory = out(name)
            if memory is not None and self._copies:
                memory.copy_(tensor)
            yield name, tensor if memory is None else memory


def cluster_figures() -> dict[str, Any]:
    """Estimates for a 70B model in BF16 and in FP8 on trainers with 8 to 64 GPUs."""
    num_parameters, num_layers, bucket_bytes = 70.6e9, 80, 512 * MIB
    figures = {}
    for num_gpus, tp, pp in ((8, 8, 1), (16, 8, 2), (32, 8, 4), (64, 8, 8)):
        for precision, num_bytes in (("bf16", 2 * num_parameters), ("fp8", num_parameters * 1.0002)):
            # gate and up are sent together. In BF16 they fill a bucket alone, so a layer takes three buckets, in FP8 two
            num_buckets = max(num_layers * (3 if precision == "bf16" else 2), round(num_bytes / bucket_bytes))
            estimate = estimate_sync(num_bytes, num_buckets, CLUSTER, num_stages=pp)
            figures[f"{num_gpus} GPUs tp{tp} pp{pp} {precision}"] = round(estimate.total_s, 1)
    return {"assumed": vars(CLUSTER), "seconds": figures}


def main() -> None:
    """Measures, or calculates with --cluster, and prints one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=1600, help="size of the model, MiB")
    parser.add_argument("--bucket-mib", type=int, default=256, help="--sync-bucket-mib")
    parser.add_argument("--version", default="0.5.23", help="SGLang's, as installed by `make servers`")
    parser.add_argument(
        "--rounds", type=int, default=8, help="number of syncs and of bare broadcasts to measure"
    )
    parser.add_argument("--no-gather", action="store_true", help="leave out the trainer's own work")
    parser.add_argument("--cluster", action="store_true", help="calculate a 70B model's sync instead")
    options = parser.parse_args()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # SystemExit runs the clean-up, which stops the server
    print(json.dumps(cluster_figures() if options.cluster else measure(options)), flush=True)


if __name__ == "__main__":
    main()
