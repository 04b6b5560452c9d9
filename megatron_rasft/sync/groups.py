"""The process group over which one pipeline stage sends to the servers, and a broadcast that cannot hang.

The trainer's rank is rank 0 of the group, the servers' tensor-parallel ranks follow. The group is built
from torch's backends directly and not registered with torch.distributed, so that it can be aborted and made
anew at any time without a trace in the trainer's own groups.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import accumulate
from threading import Thread
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rasft.errors import ServerError, first_line
from megatron_rasft.servers.client import ServerClient
from megatron_rasft.servers.record import call_all
from megatron_rasft.sync.buckets import Bucket

GroupBackend = Literal["gloo", "nccl"]

_SETTLE_S = 1.0
"""After a first failure: time for the server that caused it to be known from those it took along."""

_SETTLE_JOIN_S = 3.0
"""The same while joining: a server that finds no store any more would look for it for half an hour."""

_LONGEST_GRACE_S = 20.0
"""After an abort: time for the other servers to notice and answer. Also the longest an abort itself is waited for."""

_POLL_S = 0.001
"""Between two looks at whether a broadcast of NCCL's has ended."""


class GroupFailure(Exception):
    """A collective with servers did not succeed; the group was aborted.

    Args:
        reason: what happened.
        servers: url -> reason of the servers that are at fault; empty if it could not be told.
    """

    def __init__(self, reason: str, servers: dict[str, str]) -> None:
        super().__init__(reason)
        self.servers = servers


def prepare_nccl(interface: str | None = None) -> None:
    """Have NCCL start in this process so that it fits SGLang's; before anything here has used it, as it reads this once.

    SGLang switches NCCL's cuMem allocator off (_set_envs_and_config in srt/entrypoints/engine.py), and two processes on
    one node whose settings differ cannot map each other's memory. A value that the user has set stays.

    Args:
        interface: network interface, or a pattern of NCCL's; for everything that this process sends by NCCL.
    """
    os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
    if interface:
        os.environ["NCCL_SOCKET_IFNAME"] = interface


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set variables for as long as the block runs."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _in_thread[T](work: Callable[..., T], *args: Any) -> Future[T]:
    """Do ``work`` in a thread that the end of the process does not wait for: NCCL can be stuck for ever while it connects."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work(*args))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="sync", daemon=True).start()
    return future


def _cause(problem: BaseException) -> str:
    """An error of torch in a line: its first one, and what NCCL says at the end of its own."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    at = lines.index("Last error:") + 1 if "Last error:" in lines else len(lines)
    return ": ".join([first_line(problem), *lines[at : at + 1]])


def local_address(urls: Sequence[str], interface: str | None = None) -> str:
    """The address of this machine that the servers can reach: the interface's, else the one from which it would talk to them.

    A server on another machine decides; loopback is the answer only if all servers are on this one.

    Raises:
        ValueError: there is no way to one of the servers.
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
                probe.connect(target)  # of a datagram socket: nothing is sent
                addresses.append(probe.getsockname()[0])
        except OSError as error:
            raise ValueError(
                f"the address from which {url} can be reached cannot be told ({error}). Name it with --sync-address, "
                "or the network with --sync-interface."
            ) from error
    return next((a for a in addresses if not a.startswith("127.") and a != "::1"), addresses[0])


def _interface_address(interface: str) -> str | None:
    """Its IPv4 address on this machine; None if there is none, as for a pattern that only NCCL understands."""
    found = psutil.net_if_addrs().get(interface, [])
    return next((entry.address for entry in found if entry.family == socket.AF_INET), None)


def is_own_address(address: str) -> bool:
    """Whether this machine has the address, so that servers which connect to it arrive here."""
    try:
        family, kind, proto, _, target = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.bind(target)
    except OSError:
        return False
    return True


class UpdateGroup:
    """This rank and some servers, joined for broadcasts from this rank.

    Args:
        servers: in the order of their ranks.
        tp_sizes: how many ranks each of them takes.
        name: unique among all groups these servers were ever in.
        backend: gloo for a trainer on CPUs, nccl on GPUs.
        address: of this machine, as the servers reach it.
        port: of the rendezvous on this machine; 0: one that is free.
        interface: network interface for gloo's data, None: it chooses; for NCCL's see ``prepare_nccl``.
        device: the device of what will be broadcast.
        timeout_s: longest time for the servers to join, and for a broadcast.

    Raises:
        GroupFailure: not all servers joined in time.
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
        self._device = device
        self._backend: Any = None
        # the trainer's own stream must not come to wait for the servers: the next bucket is gathered on it
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._join(tp_sizes, backend, address, port, interface)

    def _use_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # per thread

    def _join(
        self,
        tp_sizes: Sequence[int],
        backend: GroupBackend,
        address: str,
        port: int,
        interface: str | None,
    ) -> None:
        timeout = timedelta(seconds=self._timeout_s)
        # The store is made here and not by torch's rendezvous: under torchrun that would only connect, to an agent's
        # store that does not exist at this address (TORCHELASTIC_USE_AGENT_STORE).
        try:
            store = dist.TCPStore(
                address, port, is_master=True, wait_for_workers=False, timeout=timeout, multi_tenant=False
            )
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"--sync-address {address} --sync-port {port}: no rendezvous can be opened there "
                f"({_cause(error)}). Give an address of this machine and a free port, or 0 for any."
            ) from error
        port, world_size = store.port, 1 + sum(tp_sizes)
        client = dist.TCPStore(address, port, is_master=False, timeout=timeout)
        joining = _in_thread(self._make_backend, backend, client, world_size, interface, timeout)

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
        # closing the store is how servers that wait in the rendezvous get an error
        self._store: dist.Store | None = store
        del store
        self._backend = self._watch(
            joining, posts, self._abort_backend, "joining the update group", _SETTLE_JOIN_S
        )

    def _make_backend(
        self,
        backend: GroupBackend,
        store: dist.Store,
        world_size: int,
        interface: str | None,
        timeout: timedelta,
    ) -> Any:
        self._use_device()
        # Keys as in torch's _new_process_group_helper, which the servers use.
        device = "cpu" if backend == "gloo" else "cuda"
        for prefix in (self.name, f"{self.name}/", f"{device}/"):
            store = dist.PrefixStore(prefix, store)
        if backend == "gloo":
            gloo: Any = dist.ProcessGroupGloo
            options = gloo._Options()
            options._devices = [
                gloo.create_device(interface=interface) if interface else gloo.create_default_device()
            ]
            options._timeout = timeout
            options._threads = 2
            return gloo(store, 0, world_size, options)
        nccl_options = dist.ProcessGroupNCCL.Options()
        # this class aborts in time
        nccl_options._timeout = timeout * 10 + timedelta(minutes=10)
        # Torch's watchdog ends the process at the first error that NCCL reports, and a server that died is one. With these,
        # which the group reads here, it has none, and wait() raises the error (ProcessGroupNCCL.cpp).
        with _environment(TORCH_NCCL_BLOCKING_WAIT="1", TORCH_NCCL_ASYNC_ERROR_HANDLING="0"):
            return dist.ProcessGroupNCCL(store, 0, world_size, nccl_options)

    def broadcast(self, bucket: Bucket, memory: Tensor) -> None:
        """Send a bucket ([num_bytes] uint8) and have every server load it; returns when all have.

        Raises:
            GroupFailure: a server did not; the group is aborted and of no more use.
        """

        def load(server: ServerClient) -> None:
            server.update_weights_from_distributed(
                names=[slot.tensor.name for slot in bucket.slots],
                dtypes=[str(slot.tensor.dtype).removeprefix("torch.") for slot in bucket.slots],
                shapes=[slot.tensor.shape for slot in bucket.slots],
                group_name=self.name,
                flush_cache=False,
                deadline_s=self._timeout_s + _LONGEST_GRACE_S,
            )

        posts = {_in_thread(load, server): server.url for server in self.servers}
        sending = _in_thread(self._send, memory)
        self._watch(sending, posts, self._abort_backend, f"the bucket of {bucket.hf_names[0]}")

    def _send(self, memory: Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        # held here: gloo's destructor waits for what is running, which must not be the main thread's wait
        backend = self._backend
        if self._stream is None:
            backend.broadcast([memory], options).wait()
            return
        self._use_device()
        with torch.cuda.stream(self._stream):
            work = backend.broadcast([memory], options)
            # Not wait(), which has a stream wait for the broadcast: with CUDA_DEVICE_MAX_CONNECTIONS=1 all streams would.
            while not work.is_completed():
                time.sleep(_POLL_S)
            work.wait()  # raises what went wrong

    def _watch(
        self,
        collective: Future[Any],
        posts: dict[Future[None], str],
        give_up: Callable[[], None],
        what: str,
        settle_s: float = _SETTLE_S,
    ) -> Any:
        """The collective's result, once it and all posts succeeded; else give up and tell whose fault it was."""
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
        give_up()
        # The others notice that this rank is gone, and answer with a failure; who does not is stuck. A collective of
        # gloo cannot be interrupted: its thread ends at its own deadline.
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
        unreachable, refused = {}, {}
        for future, url in posts.items():
            error = future.exception() if future.done() else None
            if not future.done():
                unreachable[url] = f"was stuck in {what}, for more than {self._timeout_s:g} s"
            elif isinstance(error, ServerError):
                if error.status is None:
                    unreachable[url] = f"{error.reason} (in {what})"
                elif before.get(url) is error:
                    refused[url] = f"{error.reason} (in {what})"
            elif error is not None:
                raise error
        faults = unreachable or refused
        problem = collective.exception() if collective.done() else None
        reason = next(iter(faults.values()), "")
        if not reason:
            reason = f"{what} took more than {self._timeout_s:g} s" if is_late else f"{what} failed"
            if problem is not None:
                reason += f" ({_cause(problem)})"
        return GroupFailure(reason, faults)

    def _abort_backend(self) -> None:
        backend, self._backend = self._backend, None
        if backend is not None:
            # an abort of NCCL's can wait for the device
            wait([_in_thread(backend.abort)], _LONGEST_GRACE_S)
        self._store = None

    def abort(self) -> None:
        """Leave at once; servers that wait in this group get an error."""
        self._abort_backend()

    def close(self, servers: Sequence[ServerClient] | None = None) -> None:
        """Leave, and have these servers (None: all) leave too. A failure has no consequence: names are not used twice."""
        # together: between processes of one node, to leave a communicator of NCCL's is collective
        leaving = _in_thread(call_all, self.servers if servers is None else servers, self._leave)
        self.abort()
        leaving.result()

    def _leave(self, server: ServerClient) -> None:
        with suppress(ServerError):
            server.destroy_weights_update_group(self.name, deadline_s=min(self._timeout_s, _LONGEST_GRACE_S))
