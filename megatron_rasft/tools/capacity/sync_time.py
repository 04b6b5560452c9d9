"""How long a sync will take on a given cluster: arithmetic on measured or assumed speeds, checked by the benchmark."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SyncCosts:
    """What the parts of a sync cost; bytes per second unless said otherwise."""

    gather: float
    """A stage's parameters put together on its source, over its tensor-parallel group."""
    network: float
    """One broadcast from a source to all servers: the slower of its network card and the servers' own links."""
    load: float
    """A server copying a received bucket into its weights."""
    request_s: float
    """Seconds per bucket that move nothing: the request, its answer, the launch of the collective."""
    control_s: float
    """Seconds per sync for pausing, flushing, labelling and going on."""
    proof: float | None = None
    """Hashing on trainer or server, if the sync is proven by checksums; None: it is not."""


@dataclass(frozen=True, kw_only=True)
class SyncEstimate:
    """Seconds of one sync."""

    gather_s: float
    """Of all buckets; hidden but for the first of each stage while the bucket before is on its way."""
    send_s: float
    """Network, load and request of all buckets, which follow each other."""
    proof_s: float
    total_s: float


def estimate_sync(
    num_bytes: float, num_buckets: int, costs: SyncCosts, *, num_stages: int = 1, overlaps: bool = True
) -> SyncEstimate:
    """Time to give all servers ``num_bytes`` of weights.

    The number of servers does not enter: a broadcast passes them like beads on a string. Neither does the number
    of stages, which take turns, but for one gather each that nothing hides.

    Args:
        num_bytes: of the weights as they are sent.
        num_buckets: of all stages together.
        costs: speeds of this cluster.
        num_stages: pipeline stages.
        overlaps: whether a bucket is gathered while the one before is sent.
    """
    gather_s = num_bytes / costs.gather
    send_s = num_bytes / costs.network + num_bytes / costs.load + num_buckets * costs.request_s
    proof_s = num_bytes / costs.proof if costs.proof else 0.0
    first_s = gather_s / num_buckets * num_stages
    # the hash of a bucket is taken in the same time as its gather
    transfer_s = (
        first_s + max(send_s, gather_s + proof_s - first_s) if overlaps else gather_s + send_s + proof_s
    )
    return SyncEstimate(
        gather_s=gather_s,
        send_s=send_s,
        proof_s=proof_s,
        total_s=transfer_s + costs.control_s,
    )
