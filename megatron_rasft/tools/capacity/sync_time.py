"""Estimates the time of a weight sync from measured or assumed speeds; benchmarks/weight_sync.py checks the estimate."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SyncCosts:
    """Speeds of the parts of a sync, in bytes per second unless the name ends in _s."""

    gather: float
    """Gathering a stage's parameters on its sender, over its tensor-parallel group."""
    network: float
    """A broadcast from a sender to all servers: the slower of its network card and the links between the servers."""
    load: float
    """Copying a received bucket into a server's weights."""
    request_s: float
    """Fixed seconds per bucket: the request, its answer and the launch of the collective."""
    control_s: float
    """Fixed seconds per sync: pausing the servers, emptying their cache, setting the weight version, resuming."""
    proof: float | None = None
    """Hashing on trainer or server, if checksums prove the sync; otherwise None."""


@dataclass(frozen=True, kw_only=True)
class SyncEstimate:
    """The time of one sync, in seconds."""

    gather_s: float
    """Gathering all buckets. Only each stage's first bucket adds time, because the others are gathered during a send."""
    send_s: float
    """Sending all buckets one after another: network, load and request."""
    proof_s: float
    total_s: float


def estimate_sync(
    num_bytes: float, num_buckets: int, costs: SyncCosts, *, num_stages: int = 1, overlaps: bool = True
) -> SyncEstimate:
    """Estimates the time to send ``num_bytes`` of weights to all servers.

    The number of servers does not matter, because a broadcast forwards the data from server to server in small pieces. The
    stages send one after another, so their number only matters for the first gather of each stage, which no send hides.

    Args:
        num_bytes: bytes of the weights as they are sent.
        num_buckets: buckets of all stages together.
        costs: speeds of this cluster.
        num_stages: pipeline stages.
        overlaps: whether a bucket is gathered while the previous one is sent.
    """
    gather_s = num_bytes / costs.gather
    send_s = num_bytes / costs.network + num_bytes / costs.load + num_buckets * costs.request_s
    proof_s = num_bytes / costs.proof if costs.proof else 0.0
    first_s = gather_s / num_buckets * num_stages
    # a bucket is hashed right after its gather, while the previous bucket is being sent
    transfer_s = (
        first_s + max(send_s, gather_s + proof_s - first_s) if overlaps else gather_s + send_s + proof_s
    )
    return SyncEstimate(
        gather_s=gather_s,
        send_s=send_s,
        proof_s=proof_s,
        total_s=transfer_s + costs.control_s,
    )
