"""Flags of ``megatron_rasft/sync``: how new weights are sent to the rollout servers, and how their arrival is proven."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_rasft.flags import FlagSection, NonNegativeInt, PositiveFloat, PositiveInt, Range
from megatron_rasft.types import PauseMode


@dataclass(kw_only=True)
class SyncConfig(FlagSection):
    """Sending the trainer's weights to the rollout servers."""

    sync_method: Literal["broadcast", "disk", "tensor"] = "broadcast"
    """broadcast: over the network, into the servers' memory; disk: through a folder that trainer and servers share; tensor: for
    servers on the trainer's own GPUs (on a CPU: in the request itself)."""

    sync_bucket_mib: PositiveInt = 512
    """Weights sent at once, MiB. A sync takes the memory of at most two such buckets on the trainer and of one on a server (two
    with SGLang 0.5.17 or older). Larger tensors that belong together (an embedding, gate and up projection) are sent alone. On
    a CPU the memory is kept for the next sync, unless the system needs it."""

    sync_timeout_s: PositiveFloat = 120.0
    """Longest time that a server may take for one step of a sync (a request, a bucket, joining), seconds. A slower server is left
    out and the sync begins again without it. Keep it well below --distributed-timeout-minutes."""

    sync_pause_mode: PauseMode = "abort"
    """Treatment of running requests during a sync. abort: they end with the tokens they have; retract: they wait and continue
    with the new weights (from SGLang 0.5.21 on; earlier servers abort); in_place: like retract, but they keep the key-value
    cache of the old weights."""

    sync_address: str | None = None
    """Address at which the servers reach the trainer's node. Unset: the address of --sync-interface, else the address from
    which the node reaches the servers. Leave it out if pipeline stages are on several nodes, because each node sends its own
    stages."""

    sync_port: Annotated[int, Range(at_least=0, at_most=65535)] = 0
    """First port of the rendezvous with the servers, which takes one port per pipeline stage. 0 takes free ports."""

    sync_interface: str | None = None
    """Network interface for the weights, such as eth0; it must have this name on every node. NCCL knows one interface per process,
    so it uses it for the trainer's own traffic too. Unset: the backend chooses."""

    sync_proof: Literal["auto", "checksum", "read_back", "off"] = "auto"
    """Proof that the servers have the trainer's weights. checksum: compare every tensor bit for bit (servers on a CPU only);
    read_back: compare some rows of some tensors (Llama models only); auto: the best proof that these servers support."""

    sync_proof_interval: NonNegativeInt = 10
    """Syncs between two proofs. The first sync and every sync after a failure are always proven; 0 proves no other sync."""

    sync_disk_folder: str | None = None
    """Folder of --sync-method disk. Trainer and servers must see it under the same path. It keeps the last two versions."""

    def check(self) -> None:
        if self.sync_method == "disk" and not self.sync_disk_folder:
            raise self.refusal(
                "sync_method", "needs --sync-disk-folder DIR: a folder that trainer and servers share."
            )
