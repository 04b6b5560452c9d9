"""The tests of tests/unit/sync/ in a version for GPUs."""

import base64
import io
import multiprocessing
import pickle
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rasft.sync.buckets import plan_buckets
from megatron_rasft.sync.colocated import serialize_bucket
from megatron_rasft.sync.groups import GroupFailure, UpdateGroup
from megatron_rasft.sync.wire_format import WireFormat
from megatron_rasft.weights.fp8_blocks import quantize_blocks, scale_shape
from tests.unit.sync.stand_ins import StandIn
from tests.unit.sync.test_buckets import model

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def bucket() -> Any:
    (bucket,) = plan_buckets(model(), WireFormat(torch.bfloat16), 10**9)
    memory = torch.randint(0, 256, (bucket.num_bytes,), dtype=torch.uint8, device=DEVICE)
    return bucket, memory


def test_quantizing_gives_the_same_on_gpu_and_cpu() -> None:
    weight = torch.randn(300, 257, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    results = []
    for device in ("cpu", DEVICE):
        values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=device)
        scales = torch.empty(scale_shape(tuple(weight.shape)), device=device)
        quantize_blocks(weight.to(device), values, scales)
        results.append((values.view(torch.uint8).cpu(), scales.cpu()))
    assert torch.equal(results[0][1], results[1][1])
    # a quotient halfway between two values may be rounded differently
    assert (results[0][0] != results[1][0]).float().mean() < 1e-3


def read_handles(payload: str, results: Any) -> None:
    content = pickle.load(io.BytesIO(base64.b64decode(payload)))
    flat = content["flattened_tensor"].cpu()
    results.put([(place.name, flat[place.start_idx : place.end_idx]) for place in content["metadata"]])


def test_another_process_reads_a_bucket_over_cuda_ipc(bucket: Any) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    reader = context.Process(target=read_handles, args=(serialize_bucket(*bucket), results))
    reader.start()
    read = dict(results.get(timeout=120))
    reader.join()
    for name, view in bucket[0].views(bucket[1]).items():
        assert torch.equal(read[name], view.reshape(-1).view(torch.uint8).cpu())


def join_by_nccl(server: StandIn, rank_device: int) -> None:
    """Makes a stand-in join over NCCL with another GPU."""

    def init(
        *, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str, **_: Any
    ) -> None:
        torch.cuda.set_device(rank_device)
        timeout = timedelta(seconds=60)
        store: Any = dist.TCPStore(master_address, master_port, is_master=False, timeout=timeout)
        for prefix in (group_name, f"{group_name}/", "cuda/"):
            store = dist.PrefixStore(prefix, store)
        server.groups[group_name] = dist.ProcessGroupNCCL(store, rank_offset, world_size, timeout)

    server.init_weights_update_group = init  # type: ignore[method-assign]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: NCCL allows one rank per GPU")
def test_a_stuck_server_is_aborted_at_the_deadline_over_nccl(bucket: Any) -> None:
    server = StandIn("http://a:1", has_update_session=False)
    join_by_nccl(server, 1)
    group = UpdateGroup(
        [server],
        [1],
        name="nccl",
        backend="nccl",
        address="127.0.0.1",
        port=0,
        interface=None,
        device=DEVICE,
        timeout_s=10,
    )
    server.before["update"] = lambda: time.sleep(25)
    began = time.monotonic()
    with pytest.raises(GroupFailure, match="did not answer"):
        group.broadcast(*bucket)
    assert time.monotonic() - began < 40
    torch.ones(1, device=DEVICE).add_(1).cpu()  # shows that the device still works
