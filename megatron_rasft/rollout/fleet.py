"""The rollout servers of a run: which there are, which may be asked, and why the others may not.

A server enters by a weight sync and leaves by its first grave fault; only another full sync brings it back, since
nobody knows which weights a server that failed or was restarted has. The trainer, once per refresh:

    servers = fleet.find()                      # everything that answers: new ones and quarantined ones too
    ...a full sync of version v to all of them...
    fleet.admit(url, v)                         # for each server that has the weights
    fleet.quarantine(url, reason)               # for each that failed

The methods may be called from several threads.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx

from megatron_rasft.config import RolloutConfig
from megatron_rasft.config.rollout import check_address
from megatron_rasft.errors import RolloutError, ServerError
from megatron_rasft.servers.addresses import endpoints, read_addresses
from megatron_rasft.servers.client import ServerClient
from megatron_rasft.servers.info import ServerInfo

_PROBE_S = 30.0
"""Longest time a server may take to say what it is; it does not generate for that."""
_BETWEEN_PROBES_S = 2.0
_MUST_MATCH = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)
"""Fields of config.json that say whether the trainer's tensors fit a server's model."""


@dataclass(eq=False)
class Member:
    """One server as the run knows it."""

    url: str
    control: ServerClient
    weight_version: int | None = None
    """Weights it is known to have; None: it may not be asked before a full sync."""
    fault: str = ""
    """Why it may not be asked, as it was last said."""
    num_quarantines: int = 0
    num_in_flight: int = 0
    max_in_flight: int = 1
    num_failures_in_row: int = 0
    num_samples: int = 0
    """Finished samples it gave, in the whole run."""
    num_tokens: int = 0
    info: ServerInfo | None = field(default=None, repr=False)


class Fleet:
    """All servers that the flags and the server file name.

    Args:
        config: the rollout flags.
        api_key: bearer key of the servers, None without one.
        admin_api_key: key of the control calls where they have another.
        model_config: config.json of the trainer's model; a server whose own can be read must match it.
        say: told each change in one line.
        transport: stands in for the network in tests.
    """

    def __init__(
        self,
        config: RolloutConfig,
        *,
        api_key: str | None = None,
        admin_api_key: str | None = None,
        model_config: dict[str, object] | None = None,
        say: Callable[[str], None] = print,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.config = config
        self.api_key = api_key
        self.say = say
        self._admin_api_key = admin_api_key
        self._model_config = model_config
        self._transport = transport
        self._lock = threading.RLock()
        self._members: dict[str, Member] = {}
        self._has_waited = False
        self._named: list[str] | None = None
        """What --rollout-server-file named when it could last be read."""
        self._file_fault = ""

    def close(self) -> None:
        """Close the control connections; the servers go on running."""
        for member in self.members:
            member.control.close()

    @property
    def members(self) -> list[Member]:
        """Every server, also those that may not be asked."""
        with self._lock:
            return list(self._members.values())

    def serving(self, weight_version: int) -> list[Member]:
        """The servers that have these weights."""
        return [m for m in self.members if m.weight_version == weight_version]

    @property
    def vocab_size(self) -> int | None:
        """The smallest vocabulary of the trainer's model and the servers', as far as they are known."""
        configs = [self._model_config, *(m.info.model_config for m in self.members if m.info is not None)]
        sizes = [c.get("vocab_size") for c in configs if c is not None]
        return min((size for size in sizes if isinstance(size, int)), default=None)

    @property
    def needs_sync(self) -> bool:
        """Whether a server that answered the last ``find`` may not be asked yet."""
        return any(m.info is not None and m.weight_version is None for m in self.members)

    def find(self, check: Callable[[], None] = lambda: None) -> list[ServerClient]:
        """Every server that answers and fits, to be synced next; in the order of the flags, then of the file.

        Waits up to --rollout-wait-s for the first one. With --rollout-without-servers demonstrations it waits once
        in a run, and then returns [] where there is none.

        Args:
            check: called now and then while it waits; what it raises ends the wait.

        Raises:
            RolloutError: no server answered in time and the run may not go on without.
            ValueError: --rollout-server-file could not be read, and never was before.
        """
        is_error = self.config.rollout_without_servers == "error"
        waits = is_error or not self._has_waited
        ends = time.monotonic() + (self.config.rollout_wait_s if waits else 0.0)
        has_spoken = False
        while True:
            self._read_members()
            found = self._probe_all(is_silent=has_spoken)
            if found:
                self._has_waited = True
                return found
            left = ends - time.monotonic()
            if left <= 0:
                break
            if not has_spoken:
                self.say(f"no rollout server answers; waiting up to {left:.0f} s")
                has_spoken = True
            check()
            time.sleep(min(_BETWEEN_PROBES_S, left))
        self._has_waited = True
        reasons = "; ".join(f"{m.url} {m.fault}" for m in self.members) or (
            f"{self.config.rollout_server_file} names none"
            if self.config.rollout_server_file
            else "none is named"
        )
        if is_error:
            raise RolloutError(
                f"no rollout server answered within {self.config.rollout_wait_s:g} s (--rollout-wait-s): {reasons}. Start one "
                "with tools/serve_rollouts.py, or train on demonstrations meanwhile with --rollout-without-servers "
                "demonstrations."
            )
        self.say(f"no rollout server ({reasons}): training on demonstrations alone")
        return []

    def lacking(self, weight_version: int, found: Sequence[ServerClient]) -> list[str]:
        """Of the servers that were just found, those that are not known to have these weights, or no longer say so.

        One that can release its memory may sleep, and then has no weights whatever it says.
        """
        having = {
            member.url
            for member in self.serving(weight_version)
            if member.info is not None
            and member.info.weight_version == weight_version
            and not member.info.has_memory_saver
        }
        return [server.url for server in found if server.url not in having]

    def admit(self, url: str, weight_version: int) -> None:
        """The server has received and proven these weights: it may be asked from now on."""
        with self._lock:
            member = self._members[url]
            if member.fault:
                self.say(f"rollout server {url} is back, with the weights of step {weight_version}")
            member.weight_version = weight_version
            member.fault = ""
            member.num_failures_in_row = 0

    def quarantine(self, url: str, reason: str) -> None:
        """Ask the server nothing more until it has had a full sync; said once."""
        with self._lock:
            member = self._members.get(url)
            if member is None or (member.weight_version is None and member.fault == reason):
                return
            was_serving = member.weight_version is not None
            member.weight_version = None
            member.fault = reason
            member.num_quarantines += was_serving
        self.say(f"rollout server {url} {reason}{': left out for now' if was_serving else ''}")

    def _read_members(self) -> None:
        named = dict.fromkeys(check_address(url, "--rollout-urls") for url in self.config.rollout_urls)
        if self.config.rollout_server_file is not None:
            named |= dict.fromkeys(self._read_file(self.config.rollout_server_file))
        with self._lock:
            for url in [u for u in self._members if u not in named]:
                self._members.pop(url).control.close()
                self.say(f"rollout server {url} has signed off")
            for url in named:
                if url not in self._members:
                    control = ServerClient(
                        url,
                        api_key=self.api_key,
                        admin_api_key=self._admin_api_key,
                        transport=self._transport,
                    )
                    self._members[url] = Member(url, control)
            self._members = {url: self._members[url] for url in named}

    def _read_file(self, path: str) -> list[str]:
        """The servers that the file names; those of before while somebody has damaged it in the midst of a run."""
        try:
            self._named, fault = read_addresses(path), ""
        except ValueError as error:
            if self._named is None:
                raise
            fault = str(error)
        if fault and fault != self._file_fault:
            self.say(f"--rollout-server-file {path} cannot be read, the servers of before are kept: {fault}")
        self._file_fault = fault
        return self._named

    def _probe_all(self, is_silent: bool) -> list[ServerClient]:
        members = self.members
        if not members:
            return []
        with ThreadPoolExecutor(len(members)) as pool:
            faults = list(pool.map(self._probe, members))
        doubles = named_twice([m.info for m in members if m.info is not None])
        faults = [doubles.get(m.url, fault) for m, fault in zip(members, faults, strict=True)]
        for member, fault in zip(members, faults, strict=True):
            if not fault:
                continue
            member.info = None
            if is_silent or member.fault == fault:
                with self._lock:
                    member.weight_version, member.fault = None, fault
            else:
                self.quarantine(member.url, fault)
        return [m.control for m, fault in zip(members, faults, strict=True) if not fault]

    def _probe(self, member: Member) -> str:
        """What is wrong with a server; empty if it can be synced."""
        member.info = None
        try:
            info = member.control.probe(_PROBE_S)
        except ServerError as error:
            return error.reason
        if info.dp_size > 1 or info.pp_size > 1:
            return (
                f"runs with --dp-size {info.dp_size} --pp-size {info.pp_size}, but weights can only be sent to "
                "tensor-parallel servers. Start several servers instead"
            )
        mismatch = config_mismatch(self._model_config, info.model_config)
        if mismatch:
            return f"serves another model than --hf-model ({mismatch})"
        member.info = info
        member.max_in_flight = min(
            self.config.rollout_concurrency, info.max_running_requests or self.config.rollout_concurrency
        )
        return ""


def named_twice(infos: Sequence[ServerInfo]) -> dict[str, str]:
    """Address -> what is wrong with it, for each that leads to the server of one before it.

    Two servers behind one address, as behind an ingress, have drawn different seeds.
    """
    faults: dict[str, str] = {}
    for number, info in enumerate(infos):
        alike = [i for i in infos[:number] if i.random_seed is not None and i.random_seed == info.random_seed]
        first = next((i.url for i in alike if endpoints(i.url) & endpoints(info.url)), None)
        if first is not None:
            faults[info.url] = f"is the same server as {first}: name it once"
    return faults


def config_mismatch(ours: dict[str, object] | None, theirs: dict[str, object] | None) -> str:
    """The first field of config.json in which two models differ too much for their weights to fit; else empty."""
    if ours is None or theirs is None:
        return ""
    for name in _MUST_MATCH:
        if name in ours and name in theirs and ours[name] != theirs[name]:
            return f"{name} is {theirs[name]} there, {ours[name]} here"
    return ""
