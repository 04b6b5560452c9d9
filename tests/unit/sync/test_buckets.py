"""Buckets are bounded and aligned, keep related tensors together, and never overlap in the arena."""

import math
import mmap
from typing import Any, NamedTuple

import pytest
import torch

from megatron_rasft.sync.buckets import Arena, MemoryPlan, plan_buckets
from megatron_rasft.sync.wire_format import WireFormat, name_on_server

BF16 = WireFormat(torch.bfloat16)
FP8 = WireFormat(torch.bfloat16, is_block_fp8=True)


class Planned(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def model(num_layers: int = 3, hidden: int = 64, vocab: int = 1000) -> list[Planned]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(num_layers):
        at = f"model.layers.{layer}."
        shapes[at + "input_layernorm.weight"] = (hidden,)
        for part in "qkv":
            shapes[f"{at}self_attn.{part}_proj.weight"] = (hidden, hidden)
        for part in "qkv":
            shapes[f"{at}self_attn.{part}_proj.bias"] = (hidden,)
        shapes[at + "mlp.gate_proj.weight"] = (3 * hidden, hidden)
        shapes[at + "mlp.up_proj.weight"] = (3 * hidden, hidden)
        shapes[at + "mlp.down_proj.weight"] = (hidden, 3 * hidden)
    shapes["model.norm.weight"] = (hidden,)
    return [Planned(name, shape, torch.bfloat16) for name, shape in shapes.items()]


@pytest.mark.parametrize("wire_format", [BF16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("limit", [1, 30_000, 60_000, 10**9])
def test_everything_is_sent_once_in_order_and_fits(wire_format: WireFormat, limit: int) -> None:
    tensors = model()
    buckets = plan_buckets(tensors, wire_format, limit)
    assert [name for bucket in buckets for name in bucket.hf_names] == [t.name for t in tensors]
    sent = [slot.tensor.name for bucket in buckets for slot in bucket.slots]
    assert sorted(sent) == sorted(w.name for t in tensors for w in wire_format.wire_tensors(t.name, t.shape))
    for bucket in buckets:
        assert bucket.num_bytes <= limit or len({name_on_server(name) for name in bucket.hf_names}) == 1


def test_tensors_that_the_server_fuses_are_in_one_bucket() -> None:
    for limit in (1, 20_000, 30_000, 50_000):
        homes: dict[str, set[int]] = {}
        for index, bucket in enumerate(plan_buckets(model(), FP8, limit)):
            for slot in bucket.slots:
                whole = name_on_server(slot.tensor.name).removesuffix("_scale_inv")
                homes.setdefault(whole, set()).add(index)
        assert all(len(indices) == 1 for indices in homes.values())


@pytest.mark.parametrize("wire_format", [BF16, FP8], ids=["bf16", "fp8"])
def test_tensors_lie_end_to_end_and_aligned(wire_format: WireFormat) -> None:
    for bucket in plan_buckets(model(hidden=65), wire_format, 50_000):
        position = 0
        for wire, start, stop in bucket.slots:
            assert start == position and start % wire.dtype.itemsize == 0
            assert stop - start == math.prod(wire.shape) * wire.dtype.itemsize
            position = stop
        assert position == bucket.num_bytes
        memory = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
        for view in bucket.views(memory).values():
            view.fill_(1)
        assert bool(memory.view(torch.uint8).any())


@pytest.mark.parametrize("copies", [0, 1, 2])
@pytest.mark.parametrize("bucket_bytes", [200_000, 400_000, 10**7])
def test_memory_stays_within_two_buckets(bucket_bytes: int, copies: int) -> None:
    plan = MemoryPlan.make(model(), BF16, bucket_bytes, copies)
    assert plan.peak_bytes <= 2 * bucket_bytes + 64
    assert all(bucket.num_bytes <= bucket_bytes for bucket in plan.buckets)


def test_a_set_larger_than_the_bucket_goes_alone() -> None:
    plan = MemoryPlan.make(model(vocab=10_000), BF16, 100_000, 1)
    alone = next(b for b in plan.buckets if b.num_bytes > 100_000)
    assert alone.hf_names == ("model.embed_tokens.weight",)
    assert all(b.num_bytes <= 100_000 for b in plan.buckets if b is not alone)
    assert plan.peak_bytes == pytest.approx(2 * alone.num_bytes, abs=64)


@pytest.mark.parametrize("bucket_bytes", [60_000, 130_000, 200_000])
def test_a_bucket_never_overlaps_the_one_being_sent(bucket_bytes: int) -> None:
    plan = MemoryPlan.make(model(num_layers=6), BF16, bucket_bytes, 1)
    arena = Arena(plan.arena_bytes, torch.device("cpu"))
    in_flight: tuple[int, int] | None = None
    num_overlapped = 0
    for bucket in plan.buckets:
        place = arena.place(bucket.num_bytes)
        if place is None:
            in_flight = None
            arena.sent(None)
            place = arena.place(bucket.num_bytes)
        elif in_flight is not None:
            num_overlapped += 1
        assert place is not None and arena.memory(place).numel() == bucket.num_bytes
        assert in_flight is None or place[1] <= in_flight[0] or place[0] >= in_flight[1]
        arena.sent(place)
        in_flight = place
    assert num_overlapped > 0 or len(plan.buckets) == 1


def test_the_first_buckets_are_small_so_that_sending_begins_early() -> None:
    mib = 2**20
    sizes = [b.num_bytes / mib for b in plan_buckets(model(num_layers=40, hidden=2048), BF16, 256 * mib)]
    assert sizes[0] <= 64 and 64 < sizes[1] <= 128 and 128 < sizes[2] <= 256
    assert all(192 < size <= 256 for size in sizes[3:-1]) and len(sizes) > 6


def test_each_shared_bucket_has_memory_of_its_own() -> None:
    plan = MemoryPlan.make(model(num_layers=6), BF16, 130_000, 1)
    apart = Arena(plan.arena_bytes, torch.device("cpu"))
    shared = Arena(plan.arena_bytes, torch.device("cpu"), is_shared=True)
    held = []
    for bucket in plan.buckets:
        place = shared.place(bucket.num_bytes)
        assert place == apart.place(bucket.num_bytes), "the same places as in memory that is not shared"
        for arena in (apart, shared):
            arena.sent(place)
        if place is not None:
            held.append(shared.memory(place))
            assert held[-1].numel() == held[-1].untyped_storage().nbytes() == bucket.num_bytes
    assert len({memory.data_ptr() for memory in held}) == len(held) > 2


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 5 * 2**20 + 3])
def test_an_arena_on_the_cpu_is_ordinary_memory_of_its_size(num_bytes: int) -> None:
    arena = Arena(num_bytes, torch.device("cpu"))
    memory = arena.memory((0, num_bytes))
    assert (memory.dtype, memory.numel()) == (torch.uint8, num_bytes)
    assert memory.fill_(7).eq(7).all()
    assert arena.memory((0, num_bytes)).data_ptr() == memory.data_ptr()
    arena.sent((0, num_bytes))
    arena.park()
    assert memory.fill_(8).eq(8).all()
    assert arena.place(num_bytes) == (0, num_bytes), "nothing is being sent any more"


@pytest.mark.parametrize("is_known", [True, False])
def test_memory_works_on_systems_without_huge_or_freeable_pages(
    is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MADV_FREE", "MADV_HUGEPAGE"):
        if is_known:
            monkeypatch.setattr(mmap, name, 9999, raising=False)  # the system call fails
        else:
            monkeypatch.delattr(mmap, name, raising=False)
    arena = Arena(100, torch.device("cpu"))
    arena.park()
    assert arena.memory((0, 100)).fill_(8).eq(8).all()


def test_memory_is_on_the_device() -> None:
    device = torch.device("meta")
    arena, shared = Arena(100, device), Arena(100, device, is_shared=True)
    for memory in (arena.memory((10, 30)), shared.memory((10, 30))):
        assert (memory.device, memory.dtype, memory.shape) == (device, torch.uint8, (20,))
    assert not arena.is_reusable and not shared.is_reusable
    assert Arena(100, torch.device("cpu")).is_reusable


def test_memory_of_a_gpu_is_allocated_once_or_for_each_shared_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a shared bucket is allocated, those that all readers have closed are freed."""
    calls: list[Any] = []

    def empty(num_bytes: int, **options: Any) -> torch.Tensor:
        calls.append((num_bytes, options))
        return torch.zeros(num_bytes)

    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: calls.append("ipc_collect"))
    monkeypatch.setattr(torch, "empty", empty)
    options: dict[str, Any] = {"dtype": torch.uint8, "device": torch.device("cuda")}
    arena, shared = Arena(100, options["device"]), Arena(100, options["device"], is_shared=True)
    assert [len(memory.memory((10, 30))) for memory in (arena, shared)] == [20, 20]
    assert calls == [(100, options), "ipc_collect", (20, options)]


def test_a_plan_without_tensors_is_empty() -> None:
    assert plan_buckets([], BF16, 100) == []
    for bucket_bytes, arena_bytes in ((100, 2 * 16), (0, 0)):
        plan = MemoryPlan.make([], BF16, bucket_bytes, 1)
        assert (plan.buckets, plan.arena_bytes, plan.gathered_bytes) == ([], arena_bytes, 0)


def test_half_of_the_memory_beside_gathering_is_for_one_bucket() -> None:
    tensors = [planned(f"{name}.weight", 10) for name in "abcdefghij"]
    plan = MemoryPlan.make(tensors, BF16, 110, 1)  # 220 bytes, of which 20 are for gathering
    assert [bucket.num_bytes for bucket in plan.buckets] == [100, 100]
    assert (plan.arena_bytes, plan.gathered_bytes) == (200, 20)


def planned(name: str, num_elements: int, dtype: torch.dtype = torch.bfloat16) -> Planned:
    return Planned(name, (num_elements,), dtype)


@pytest.mark.parametrize(
    ("num_elements", "num_buckets"), [(50, 1), (51, 2)], ids=["exact fit", "one too many"]
)
def test_a_bucket_is_filled_to_the_last_byte(num_elements: int, num_buckets: int) -> None:
    tensors = [planned("a.weight", 50), planned("b.weight", num_elements)]
    assert len(plan_buckets(tensors, BF16, limit=2 * (50 + 50))) == num_buckets


def test_the_space_left_in_a_bucket_is_counted_from_its_first_tensor() -> None:
    tensors = [planned(f"{name}.weight", 30) for name in "abcdef"]
    sizes = [len(bucket.hf_names) for bucket in plan_buckets(tensors, BF16, limit=2 * 90)]
    assert sizes == [3, 3], "three fill a bucket exactly, also the second one"


def test_gathered_bytes_are_those_of_the_largest_related_set() -> None:
    """Memory in addition to a bucket: sets are gathered one after the other, the tensors of a set together."""
    at = "model.layers.0."
    tensors = [
        planned(at + "input_layernorm.weight", 7),
        *(planned(f"{at}self_attn.{part}_proj.weight", 10) for part in "qkv"),
        planned(at + "mlp.down_proj.weight", 29),
    ]
    (bucket,) = plan_buckets(tensors, BF16, limit=10**6)
    assert bucket.gathered_bytes == 2 * 3 * 10
    fp32 = [t._replace(dtype=torch.float32) for t in tensors]
    (bucket,) = plan_buckets(fp32, BF16, limit=10**6)
    assert bucket.gathered_bytes == 4 * 3 * 10, "of the type that is gathered, not of the one that is sent"
    for copies in (0, 1, 2):
        plan = MemoryPlan.make(tensors, BF16, 10**6, copies)
        assert plan.gathered_bytes == 2 * 3 * 10 * copies


@pytest.mark.parametrize("num_bytes", [1, 8, 15, 16, 17, 100])
def test_buckets_start_at_aligned_bytes(num_bytes: int) -> None:
    """A float32 view must start at a multiple of 4 bytes, even in a bucket at the end of the arena."""
    arena = Arena(1003, torch.device("cpu"))
    arena.sent((0, 400))
    place = arena.place(num_bytes)
    assert place is not None
    start, stop = place
    assert start % 16 == 0 and stop - start == num_bytes and start >= 400 and stop <= 1003
    assert 1003 - stop < 16, "no more than one alignment is lost"


def test_a_bucket_takes_the_space_beside_the_one_being_sent_exactly() -> None:
    arena = Arena(160, torch.device("cpu"))
    arena.sent((64, 160))
    assert arena.place(64) == (0, 64) and arena.place(65) is None
    arena.sent((0, 64))
    assert arena.place(96) == (64, 160) and arena.place(97) is None


def test_the_arena_holds_the_largest_neighbours_and_their_alignment() -> None:
    """With one byte less, the second bucket of a small model would wait for the first."""
    tensors = [planned("a.weight", 33), planned("b.weight", 35), planned("c.weight", 37)]
    plan = MemoryPlan.make(tensors, BF16, 100, 0)
    assert [bucket.num_bytes for bucket in plan.buckets] == [66, 70, 74]
    assert plan.arena_bytes == 70 + 74 + 2 * 16


@pytest.mark.parametrize("limit", [1, 3_000, 10**9])
def test_tensors_between_two_fused_ones_are_in_their_bucket(limit: int) -> None:
    """The trainer has the projection from the queries' latent between those to both latents."""
    names = ["q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]
    tensors = [
        Planned(f"model.layers.{layer}.self_attn.{name}.weight", (16, 16), torch.bfloat16)
        for layer in range(2)
        for name in names
    ]
    buckets = plan_buckets(tensors, BF16, limit)
    assert [name for bucket in buckets for name in bucket.hf_names] == [t.name for t in tensors]
    for layer in range(2):
        fused = {tensors[5 * layer].name, tensors[5 * layer + 3].name}
        assert any(fused <= set(bucket.hf_names) for bucket in buckets)
    assert len(buckets) == (4 if limit == 1 else 1 if limit == 10**9 else len(buckets))
