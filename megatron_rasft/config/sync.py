"""Knobs of ``megatron_rasft/sync``: how new weights get to the rollout servers and how that is proven."""

from dataclasses import dataclass
from typing import Literal

from megatron_rasft.types import PauseMode


@dataclass(kw_only=True)
class SyncConfig:
    """Carrying the trainer's weights to the servers."""

    sync_method: Literal["broadcast", "disk", "tensor"] = "broadcast"
    """broadcast: over the network, into the servers' memory; disk: a folder on a file system that trainer and servers
    share; tensor: servers on the trainer's own GPUs (on a CPU: in the request itself)."""

    sync_bucket_mib: int = 512
    """Weights sent at once, MiB, >= 1. A sync takes at most two such buckets of the trainer's memory, and one of a
    server's (two of one as old as SGLang 0.5.17); tensors that belong together and are larger (an embedding, gate and
    up projection) go alone. On a CPU the memory stays for the next sync, unless the system needs it."""

    sync_timeout_s: float = 120.0
    """Longest time that a server may take for one step of a sync (a request, a bucket, joining), seconds, > 0; then it
    is left out and the sync begins again without it. Keep it well below --distributed-timeout-minutes."""

    sync_pause_mode: PauseMode = "abort"
    """What a sync does with running requests. abort: they return what they have, on every SGLang; retract: they wait
    and go on with the new weights, from 0.5.21 on (earlier servers are paused by abort); in_place: the same, but
    keeping the old weights' key-value cache."""

    sync_address: str | None = None
    """Address of the trainer's node as the servers reach it. Unset: of --sync-interface, else the one from which the node
    reaches them. Leave it out where pipeline stages are on several nodes, each of which sends its own."""

    sync_port: int = 0
    """First port that servers connect to for the rendezvous, one per pipeline stage, in [0, 65535]; 0 takes free ones."""

    sync_interface: str | None = None
    """Network interface that weights are sent over, such as eth0; of this name on every node. NCCL, which knows one per
    process, then uses it for the trainer's own traffic too. Unset: the backend chooses."""

    sync_proof: Literal["auto", "checksum", "read_back", "off"] = "auto"
    """How the servers' weights are proven. checksum: of every tensor, bit for bit, for servers on a CPU; read_back: some
    rows of some tensors (SGLang can do it for Llama); auto: what there is for these servers."""

    sync_proof_interval: int = 10
    """Syncs between two proofs, >= 0. The first sync, and one after a failure, is always proven; 0: no other is."""

    sync_disk_folder: str | None = None
    """Folder that --sync-method disk writes to, seen by trainer and servers under this name. The last two versions
    stay there."""

    def __post_init__(self) -> None:
        if self.sync_bucket_mib < 1:
            raise ValueError(
                f"--sync-bucket-mib must be >= 1, got {self.sync_bucket_mib}. The default is 512."
            )
        if self.sync_timeout_s <= 0:
            raise ValueError(f"--sync-timeout-s must be > 0, got {self.sync_timeout_s}. The default is 120.")
        if not 0 <= self.sync_port <= 65535:
            raise ValueError(
                f"--sync-port must be in [0, 65535], got {self.sync_port}. Use 0 for a free one."
            )
        if self.sync_proof_interval < 0:
            raise ValueError(
                f"--sync-proof-interval must be >= 0, got {self.sync_proof_interval}. Use 0 to prove the first sync only."
            )
        if self.sync_method == "disk" and not self.sync_disk_folder:
            raise ValueError(
                "--sync-method disk needs --sync-disk-folder DIR: a folder that trainer and servers share."
            )
