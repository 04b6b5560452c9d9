"""What a weight sync asks of a server: the control plane that ``rollout/`` implements and hands in."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_rasft.errors import ServerError
from megatron_rasft.servers.info import ServerInfo
from megatron_rasft.types import PauseMode


class Server(Protocol):
    """One server. Every call blocks, ends within its deadline, may run in any thread, and raises ServerError."""

    url: str

    @property
    def info(self) -> ServerInfo: ...
    def probe(self, deadline_s: float | None = None) -> ServerInfo: ...
    def weight_version(self, deadline_s: float | None = None) -> int | None: ...
    def pause(self, mode: PauseMode = "abort", deadline_s: float | None = None) -> None: ...
    def resume(self, deadline_s: float | None = None) -> None: ...
    def flush_cache(self, deadline_s: float | None = None) -> None: ...
    def begin_weight_update(self, deadline_s: float | None = None) -> None: ...
    def end_weight_update(self, deadline_s: float | None = None) -> None: ...
    def init_weights_update_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: Literal["nccl", "gloo"],
        deadline_s: float | None = None,
    ) -> None: ...
    def destroy_weights_update_group(self, group_name: str, deadline_s: float | None = None) -> None: ...
    def update_weights_from_distributed(
        self,
        *,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
        flush_cache: bool,
        weight_version: int | None = None,
        load_format: Literal["flattened_bucket"] | None = "flattened_bucket",
        deadline_s: float | None = None,
    ) -> None: ...
    def update_weights_from_tensor(
        self,
        serialized: Sequence[str],
        *,
        flush_cache: bool,
        weight_version: int | None = None,
        load_format: str | None = None,
        deadline_s: float | None = None,
    ) -> None: ...
    def update_weights_from_disk(
        self,
        folder: str | Path,
        *,
        weight_version: int | None = None,
        flush_cache: bool = True,
        deadline_s: float | None = None,
    ) -> None: ...
    def set_weight_version(self, weight_version: int, deadline_s: float | None = None) -> None: ...
    def set_weight_label(self, label: str, deadline_s: float | None = None) -> None: ...
    def release_memory(self, tags: Sequence[str] | None = None, deadline_s: float | None = None) -> None: ...
    def resume_memory(self, tags: Sequence[str] | None = None, deadline_s: float | None = None) -> None: ...
    def checksums(self, deadline_s: float | None = None) -> list[dict[str, str]]: ...
    def weights_by_name(
        self, name: str, truncate_size: int = 100, deadline_s: float | None = None
    ) -> Any: ...
    def close(self) -> None: ...


def ask_all(servers: Sequence[Server], call: Callable[[Server], Any]) -> dict[str, str]:
    """Do ``call`` on all servers at the same time; url -> reason of those where it failed."""
    if not servers:
        return {}
    with ThreadPoolExecutor(len(servers)) as pool:
        futures = {pool.submit(call, server): server for server in servers}
        wait(futures)
    return {server.url: reason for future, server in futures.items() if (reason := failure_of(future))}


def failure_of(future: Future[Any]) -> str:
    """Why a finished call failed, without the server's address; empty if it did not."""
    error = future.exception()
    if error is None:
        return ""
    if isinstance(error, ServerError):
        return error.reason
    raise error
