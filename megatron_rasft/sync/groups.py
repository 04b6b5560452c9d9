"""The process group over which one pipeline stage sends weights to the servers, with a broadcast that cannot hang.

The sender is rank 0 of the group; the servers' tensor-parallel ranks follow. The group is created from torch's backends directly,
without registering it in torch.distributed, so that it can be aborted and replaced at any time without effect on the trainer's own
groups.
"""

import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from datetime import timedelta
from ipaddress import ip_address
from itertools import accumulate
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rasft.errors import ServerError, first_line
from megatron_rasft.servers.client import ServerClient
from megatron_rasft.servers.record import call_all
from megatron_rasft.sync.broadcaster import Broadcaster, GroupBackend
from megatron_rasft.sync.buckets import Bucket

_SETTLE_S = 1.0
"""Time to wait after the first failure, so that the server that caused it is known before the servers that fail because of it."""

_SETTLE_JOIN_S = 3.0
"""The same time while servers join. It is longer because a server searches half an hour for a lost rendezvous store."""

_LONGEST_GRACE_S = 20.0
"""Longest wait for the other servers' answers after an abort, and for the abort itself."""


class GroupFailure(Exception):
    """A collective with servers failed, and the group was aborted.

    Args:
        reason: the failure.
        servers: url -> reason of the servers at fault; empty if they are not known.
    """

    def __init__(self, reason: str, servers: dict[str, str]) -> None:
        super().__init__(reason)
        self.servers = servers


def _in_thread[T](work: Callable[..., T], *args: Any) -> Future[T]:
    """Runs ``work`` in a daemon thread: NCCL can hang for ever while it connects, and the process must still be able to end."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work(*args))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="sync", daemon=True).start()
    return future


def error_with_cause(problem: BaseException) -> str:
    """Returns an error of torch in one line: its first line, and the cause that NCCL appends after "Last error:"."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    at = lines.index("Last error:") + 1 if "Last error:" in lines else len(lines)
    return ": ".join([first_line(problem), *lines[at : at + 1]])


def local_address(urls: Sequence[str], interface: str | None = None) -> str:
    """Returns the address of this machine that the servers can reach: the address of the interface, or of the route to the servers.

    A loopback address is returned only if all servers are on this machine.

    Raises:
        ValueError: there is no route to one of the servers.
    """
    if interface is not None and (address := _interface_address(interface)) is not None:
        return address
    addresses = []
    for url in urls:
        parts = urlsplit(url)
        try:
            family, kind, proto, _, target = socket.getaddrinfo(
                parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM
            )[0]
            with socket.socket(family, kind, proto) as probe:
                probe.connect(target)  # connecting a datagram socket sends nothing
                addresses.append(probe.getsockname()[0])
        except OSError as error:
            raise ValueError(
                f"there is no route to {url} ({error}). Give the address of this machine with --sync-address, or its network "
                "interface with --sync-interface."
            ) from error
    return next((a for a in addresses if not a.startswith("127.") and a != "::1"), addresses[0])


def _interface_address(interface: str) -> str | None:
    """Returns the IPv4 address of an interface; None if it has none, or is a pattern in NCCL's syntax."""
    found = psutil.net_if_addrs().get(interface, [])
    return next((entry.address for entry in found if entry.family == socket.AF_INET), None)


def is_own_address(address: str) -> bool:
    """Whether the address, or host name, is one of this machine's."""
    try:
        family, kind, proto, _, target = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.bind(target)
    except OSError:
        return False
    return True


def listening_address(address: str) -> tuple[int, str]:
    """Returns the family and the address on which a store listens that servers find at ``address``; "" for all addresses.

    Debian's /etc/hosts has 127.0.1.1 for the machine's own name. Servers on other machines reach it by this name at another address.

    Raises:
        OSError: the name is not known.
    """
    family, *_, target = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    host = str(target[0])
    is_loopback = ip_address(host).is_loopback
    is_literal = address.replace(".", "").isdigit() or ":" in address
    return family, "" if is_loopback and not is_literal and address != "localhost" else host


def _open_store(address: str, port: int, timeout: timedelta) -> dist.TCPStore:
    """Opens a store that listens on its ``listening_address`` alone. torch's own socket would listen on every interface of the machine.

    Raises:
        OSError: the address is not this machine's, or the port is taken.
    """
    family, host = listening_address(address)
    listening = socket.create_server((host, port), family=family)
    return dist.TCPStore(
        address,
        listening.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timeout,
        multi_tenant=False,
        master_listen_fd=listening.detach(),
    )


class UpdateGroup:
    """A process group of this rank and some servers, for broadcasts from this rank.

    Args:
        servers: the servers in the order of their ranks.
        tp_sizes: number of ranks of each server.
        name: a name that no earlier group of these servers has had.
        backend: gloo for a trainer on CPUs, nccl for one on GPUs.
        address: this machine's address for the servers.
        port: port of the rendezvous on this machine; 0 chooses a free one.
        interface: network interface for gloo; None lets gloo choose. For NCCL see ``prepare_nccl``.
        device: device of the memory that will be broadcast.
        timeout_s: longest time for the servers to join, and for one broadcast.

    Raises:
        GroupFailure: not all servers joined in time.
        ValueError: the rendezvous cannot be opened at this address and port.
    """

    def __init__(
        self,
        servers: Sequence[ServerClient],
        tp_sizes: Sequence[int],
        *,
        name: str,
        backend: GroupBackend,
        address: str,
        port: int,
        interface: str | None,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self.name = name
        self.servers = list(servers)
        self._timeout_s = timeout_s
        self._broadcaster: Broadcaster | None = None
        self._join(tp_sizes, backend, address, port, interface, device)

    def _join(
        self,
        tp_sizes: Sequence[int],
        backend: GroupBackend,
        address: str,
        port: int,
        interface: str | None,
        device: torch.device,
    ) -> None:
        timeout = timedelta(seconds=self._timeout_s)
        # torch's own rendezvous cannot be used: under torchrun (TORCHELASTIC_USE_AGENT_STORE) it only connects, to a store
        # that torchrun has not opened at this address
        try:
            store = _open_store(address, port, timeout)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"--sync-address {address} --sync-port {port}: the rendezvous cannot be opened "
                f"({error_with_cause(error)}). Give an address of this machine and a free port, or port 0."
            ) from error
        port, world_size = store.port, 1 + sum(tp_sizes)
        client = dist.TCPStore(address, port, is_master=False, timeout=timeout)
        joining = _in_thread(Broadcaster, backend, client, self.name, world_size, interface, device, timeout)

        def join(server: ServerClient, rank_offset: int) -> None:
            server.init_weights_update_group(
                master_address=address,
                master_port=port,
                rank_offset=rank_offset,
                world_size=world_size,
                group_name=self.name,
                backend=backend,
                deadline_s=self._timeout_s + _LONGEST_GRACE_S,
            )

        offsets = accumulate(tp_sizes, initial=1)
        posts = {
            _in_thread(join, server, offset): server.url
            for server, offset in zip(self.servers, offsets, strict=False)
        }
        # closing the store ends the rendezvous of waiting servers with an error, so this is its only reference
        self._store: dist.Store | None = store
        del store
        self._broadcaster = self._watch(joining, posts, "joining the update group", _SETTLE_JOIN_S)

    def broadcast(self, bucket: Bucket, memory: Tensor) -> None:
        """Sends a bucket ([num_bytes] uint8). Returns when every server has loaded it.

        Raises:
            GroupFailure: a server failed. The group is aborted and cannot be used again.
        """

        def load(server: ServerClient) -> None:
            server.update_weights_from_distributed(
                names=[slot.tensor.name for slot in bucket.slots],
                dtypes=[str(slot.tensor.dtype).removeprefix("torch.") for slot in bucket.slots],
                shapes=[slot.tensor.shape for slot in bucket.slots],
                group_name=self.name,
                deadline_s=self._timeout_s + _LONGEST_GRACE_S,
            )

        posts = {_in_thread(load, server): server.url for server in self.servers}
        assert self._broadcaster is not None, "the group was aborted"
        sending = _in_thread(self._broadcaster.send, memory)
        self._watch(sending, posts, f"the bucket of {bucket.hf_names[0]}")

    def _watch(
        self,
        collective: Future[Any],
        posts: dict[Future[None], str],
        what: str,
        settle_s: float = _SETTLE_S,
    ) -> Any:
        """Returns the collective's result when it and all requests have succeeded. Otherwise aborts and raises GroupFailure."""
        waiting: set[Future[Any]] = {collective, *posts}
        ends = time.monotonic() + self._timeout_s
        while waiting and (left := ends - time.monotonic()) > 0:
            done, waiting = wait(waiting, left, FIRST_COMPLETED)
            if any(future.exception() for future in done):
                break
        else:
            if not waiting:
                return collective.result()
        is_late = time.monotonic() >= ends
        if not is_late:
            wait(posts, settle_s)
        before = {url: future.exception() for future, url in posts.items() if future.done()}
        self.abort()
        # Healthy servers notice the abort and answer with a failure; a server that does not answer is stuck. A gloo
        # collective cannot be interrupted: its thread ends at its own deadline.
        wait(posts, min(self._timeout_s, _LONGEST_GRACE_S))
        raise self._failure(collective, posts, before, is_late, what)

    def _failure(
        self,
        collective: Future[Any],
        posts: dict[Future[None], str],
        before: dict[str, BaseException | None],
        is_late: bool,
        what: str,
    ) -> GroupFailure:
        """Returns the failure with the servers at fault: those that did not answer, or else those that refused first.

        Args:
            before: url -> error of the requests that had ended before the abort. Later errors are its consequences.
        """
        unreachable, refused = {}, {}
        for future, url in posts.items():
            error = future.exception() if future.done() else None
            if not future.done():
                unreachable[url] = f"did not answer within {self._timeout_s:g} s ({what})"
            elif isinstance(error, ServerError):
                if error.status is None:
                    unreachable[url] = f"{error.reason} ({what})"
                elif before.get(url) is error:
                    refused[url] = f"{error.reason} ({what})"
            elif error is not None:
                raise error
        faults = unreachable or refused
        problem = collective.exception() if collective.done() else None
        reason = next(iter(faults.values()), "")
        if not reason:
            reason = f"{what} took more than {self._timeout_s:g} s" if is_late else f"{what} failed"
            if problem is not None:
                reason += f" ({error_with_cause(problem)})"
        return GroupFailure(reason, faults)

    def abort(self) -> None:
        """Leaves the group at once. Servers that are waiting in the group get an error."""
        broadcaster, self._broadcaster = self._broadcaster, None
        if broadcaster is not None:
            # a thread, because an NCCL abort can wait for the device
            wait([_in_thread(broadcaster.abort)], _LONGEST_GRACE_S)
        self._store = None

    def close(self, servers: Sequence[ServerClient] | None = None) -> None:
        """Leaves the group together with these servers (None: all). Ignores failures, because group names are never reused."""
        # All leave at the same time, because leaving an NCCL communicator is a collective of a node's processes
        leaving = _in_thread(call_all, self.servers if servers is None else servers, self._leave)
        self.abort()
        leaving.result()

    def _leave(self, server: ServerClient) -> None:
        with suppress(ServerError):
            server.destroy_weights_update_group(self.name, deadline_s=min(self._timeout_s, _LONGEST_GRACE_S))
