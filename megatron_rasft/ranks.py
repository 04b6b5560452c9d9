"""Collectives of Python objects: rank 0 decides, and its result or its failure reaches every rank."""

import io
import pickle
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_rasft.errors import FailedElsewhere

_PATIENCE = timedelta(days=1)
"""Time-out of the patient group. Verifying a refresh's rollouts, waiting for a rollout server or for the slowest replica's samples
may take longer than the --distributed-timeout-minutes of a step."""

_patient: tuple[Callable[[], Any], Callable[[], Any]] = (lambda: None, lambda: None)
"""Weak references to the default group and to the patient group of the same ranks. They are weak because a group that outlives
destroy_process_group keeps its threads, which can abort the process when it exits."""


def on_rank_zero[T](work: Callable[[], T]) -> T:
    """Runs ``work`` on rank 0 and returns its result on every rank of the world.

    Runs one broadcast on the patient group. If ``work`` raises, rank 0 raises that error and the others raise FailedElsewhere, so
    no rank is left waiting.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    box: list[Any] = [None, None]
    failure: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except (Exception, KeyboardInterrupt) as error:
            # Ctrl-C may interrupt rank 0 alone, and the other ranks must end too.
            failure = error
            box = [None, f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(box, src=0, group=patient_group())
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise FailedElsewhere(box[1])
    return box[0]


def kept_by_rank_zero[T](work: Callable[[], T], elsewhere: T) -> T:
    """Runs ``work`` on rank 0 and keeps its result there: only success or failure is broadcast.

    Args:
        work: called on rank 0.
        elsewhere: returned on the other ranks.
    """
    result = elsewhere

    def run() -> None:
        nonlocal result
        result = work()

    on_rank_zero(run)
    return result


def gather_to_rank_zero[T](value: T | None) -> list[T]:
    """Returns on rank 0 the values of all ranks that have one, in rank order; [] on the other ranks.

    A collective of the world on the patient group. Every value is sent separately, without padding, so that only rank 0 needs
    memory for the others' values. numpy arrays are sent as raw memory; lists of numbers are pickled, which takes more space.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [] if value is None else [value]
    group = patient_group()
    packed = torch.empty(0, dtype=torch.uint8) if value is None else _packed(value)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([packed.numel()]), group=group)
    if dist.get_rank() != 0:
        if packed.numel():
            dist.send(packed, 0, group=group)
        return []
    values = [] if value is None else [value]
    for rank in range(1, dist.get_world_size()):
        if size := int(sizes[rank]):
            part = torch.empty(size, dtype=torch.uint8)
            dist.recv(part, rank, group=group)
            values.append(_unpacked(part))
    return values


def hand_out[T](work: Callable[[], Sequence[T]], replicas: Sequence[Sequence[int]]) -> T:
    """Sends every replica a value of its own, and returns it on the replica's ranks. A failure of ``work`` reaches every rank.

    A collective of the world on the patient group. Rank 0 sends one copy to the first rank of each replica. The ranks of a replica
    pass it on among themselves, so that rank 0's traffic does not grow with the size of a replica.

    Args:
        work: called on rank 0; returns one value for each replica.
        replicas: the ranks of each replica, the same on every rank. Together they are the world, and rank 0 is the first rank of the first replica.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()[0]
    own: list[T] = []
    parts: list[torch.Tensor] = []

    def pack() -> list[int]:
        values = work()
        own.append(values[0])
        # If rank 0 is alone in its replica, nobody needs its value packed.
        parts.extend(
            _packed(v) if i or len(replicas[0]) > 1 else torch.empty(0) for i, v in enumerate(values)
        )
        return [part.numel() for part in parts]

    sizes = on_rank_zero(pack)
    group, me = patient_group(), dist.get_rank()
    number = next(i for i, ranks in enumerate(replicas) if me in ranks)
    sends: list[Any] = []
    if me == 0:
        value = parts[0]
        others = zip(parts[1:], replicas[1:], strict=True)
        # All sends run at once, so no replica waits for another one's copy.
        sends = [dist.isend(part, ranks[0], group=group) for part, ranks in others]
    else:
        value = torch.empty(sizes[number], dtype=torch.uint8)
        if me == replicas[number][0]:
            dist.recv(value, 0, group=group)
    _pass_on(value, replicas[number], group)
    for send in sends:
        send.wait()
    return own[0] if me == 0 else _unpacked(value)


def _packed(value: Any) -> torch.Tensor:
    """[bytes] uint8: a pickle of protocol 5, which copies the memory of arrays once."""
    pickled = io.BytesIO()
    pickle.dump(value, pickled, protocol=5)
    return torch.frombuffer(pickled.getbuffer(), dtype=torch.uint8)


def _unpacked(packed: torch.Tensor) -> Any:
    """The inverse of ``_packed``."""
    return pickle.loads(packed.numpy())


def _pass_on(value: torch.Tensor, ranks: Sequence[int], group: Any) -> None:
    """Sends the value of ``ranks[0]`` to the other ranks. Each rank that has it sends it on, so their number doubles every round."""
    place, num_done = list(ranks).index(dist.get_rank()), 1
    while num_done < len(ranks):
        if place < num_done and place + num_done < len(ranks):
            dist.send(value, ranks[place + num_done], group=group)
        elif num_done <= place < 2 * num_done:
            dist.recv(value, ranks[place - num_done], group=group)
        num_done *= 2


def patient_group() -> Any:
    """Returns a gloo group of the world with a time-out of a day. The first call creates it and is a collective of the world."""
    global _patient
    world, group = dist.group.WORLD, _patient[1]()
    if group is None or _patient[0]() is not world:
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        _patient = (weakref.ref(world), weakref.ref(group))
    return group


def gather_to_all[T](value: T, group: Any = None) -> list[T]:
    """Returns every rank's value, in rank order, on every rank. Runs one all-gather on ``group``, the default group if None."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
