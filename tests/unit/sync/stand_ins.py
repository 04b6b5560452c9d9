"""Servers inside the test process: they join real gloo groups, keep the weights they receive, and fail on demand.

The real SGLang is tested in tests/distributed/test_sync.py. These stand-ins produce failures that cannot be caused in a real
server.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rasft.errors import ServerError
from megatron_rasft.servers.client import ServerClient
from megatron_rasft.servers.info import ServerInfo
from megatron_rasft.servers.record import ServerRecord, ServerRecords


class StandIn(ServerClient):
    """A client and its server in one object.

    ``calls`` lists the names of all calls in order; ``before`` maps the name of a call to a function that runs before it.
    """

    def __init__(self, url: str, has_update_session: bool = True) -> None:
        super().__init__(url)
        self.calls: list[str] = []
        self.before: dict[str, Callable[[], None]] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.held: list[dict[str, str]] = []
        self.rows: dict[str, Any] = {}
        self.label: int | None = None
        self.text = "default"
        self.is_open = False
        self.is_paused = False
        self.groups: dict[str, Any] = {}
        self._info = ServerInfo(
            url=url,
            version="stand-in",
            model_path="nowhere",
            model_config=None,
            architectures=(),
            dtype="auto",
            quantization=None,
            tp_size=1,
            dp_size=1,
            pp_size=1,
            weight_version=None,
            weight_label="default",
            max_total_tokens=None,
            context_length=None,
            max_running_requests=None,
            is_deterministic=False,
            random_seed=None,
            has_update_session=has_update_session,
            has_weights_checker=False,
            has_memory_saver=True,
        )

    def fail(self, reason: str = "no", status: int | None = 400) -> None:
        raise ServerError(self.url, reason, status)

    def restart(self) -> None:
        """Resets the server to a fresh start: initial weights and label, no group, no session."""
        self.label, self.text, self.is_open, self.groups, self.weights = None, "default", False, {}, {}

    def change(self, **values: Any) -> None:
        self._info = replace(self._info, **values)

    def _note(self, call: str) -> None:
        self.calls.append(call)
        self.before.get(call, lambda: None)()

    @property
    def info(self) -> ServerInfo:
        return self._info

    def record(self) -> ServerRecord:
        """Returns a record of this server in its state after a probe."""
        return ServerRecord(self.url, self, self._info)

    def probe(self, deadline_s: float | None = None) -> ServerInfo:
        self._note("probe")
        self.change(weight_version=self.label, weight_label=self.text)
        return self._info

    def weight_version(self, deadline_s: float | None = None) -> int | None:
        self._note("weight_version")
        return self.label

    def pause(self, mode: str = "abort", deadline_s: float | None = None) -> None:
        self._note(f"pause {mode}")
        self.is_paused = True

    def resume(self, deadline_s: float | None = None) -> None:
        self._note("resume")
        self.is_paused = False

    def flush_cache(self, deadline_s: float | None = None) -> None:
        self._note("flush")

    def begin_weight_update(self, deadline_s: float | None = None) -> None:
        self._note("begin")
        if self.is_open:
            self.fail("a weight-update session is already open")
        self.is_open = self._info.has_update_session

    def end_weight_update(self, deadline_s: float | None = None) -> None:
        self._note("end")
        if self._info.has_update_session and not self.is_open:
            self.fail("no weight-update session is open")
        self.is_open = False

    def init_weights_update_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        **_: Any,
    ) -> None:
        self._note("init")
        timeout = timedelta(seconds=600)
        # like torch's _new_process_group_helper on a server
        store: Any = dist.TCPStore(master_address, master_port, is_master=False, timeout=timeout)
        for prefix in (group_name, f"{group_name}/", "cpu/"):
            store = dist.PrefixStore(prefix, store)
        try:
            self.groups[group_name] = dist.ProcessGroupGloo(store, rank_offset, world_size, timeout)
        except RuntimeError as error:
            self.fail(f"rendezvous: {error}")

    def destroy_weights_update_group(self, group_name: str, deadline_s: float | None = None) -> None:
        self._note("destroy")
        if self.groups.pop(group_name, None) is None:
            self.fail("no such group")

    def update_weights_from_distributed(
        self, *, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Any], group_name: str, **_: Any
    ) -> None:
        self._note("update")
        if self._info.has_update_session and not self.is_open:
            self.fail("must run between begin_weight_update() and end_weight_update()")
        if group_name not in self.groups:
            self.fail("unknown group")
        empty = [torch.empty(tuple(s), dtype=getattr(torch, d)) for s, d in zip(shapes, dtypes, strict=True)]
        flat = torch.empty(sum(t.nbytes for t in empty), dtype=torch.uint8)
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        try:
            self.groups[group_name].broadcast([flat], options).wait()
        except RuntimeError as error:
            self.fail(f"broadcast: {error}")
        position = 0
        for name, like in zip(names, empty, strict=True):
            raw = flat[position : position + like.nbytes]
            self.weights[name] = raw.view(like.dtype).view(like.shape).clone()
            position += like.nbytes

    def update_weights_from_tensor(self, serialized: Sequence[str], **_: Any) -> None:
        self._note("tensor")

    def update_weights_from_disk(self, folder: str | Path, **_: Any) -> None:
        self._note(f"disk {Path(folder).name}")

    def set_weight_version(self, weight_version: int, deadline_s: float | None = None) -> None:
        self._note("label")
        self.label, self.text = weight_version, str(weight_version)

    def set_weight_label(self, label: str, deadline_s: float | None = None) -> None:
        self._note(f"call it {label}")
        self.label, self.text = None, label

    def release_memory(self, tags: Sequence[str] | None = None, deadline_s: float | None = None) -> None:
        self._note(f"release {' '.join(tags or ())}")

    def resume_memory(self, tags: Sequence[str] | None = None, deadline_s: float | None = None) -> None:
        self._note(f"resume {' '.join(tags or ())}")

    def checksums(self, deadline_s: float | None = None) -> list[dict[str, str]]:
        self._note("checksums")
        return self.held

    def weights_by_name(self, name: str, truncate_size: int = 100, deadline_s: float | None = None) -> Any:
        self._note("read")
        return self.rows[name][:truncate_size]

    def close(self) -> None:
        self._note("close")


def records_of(*servers: StandIn) -> ServerRecords:
    """Returns records whose clients are these stand-ins."""
    by_url = {server.url: server for server in servers}
    return ServerRecords(connect=lambda url, **_: by_url[url])
