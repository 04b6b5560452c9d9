"""The rollout servers of a run: finds them, and decides which may be sampled.

A server may be sampled after a full weight sync. Its first serious fault puts it in quarantine, and only another full sync ends
that, because the weights of a failed or restarted server are not known. Once per refresh the trainer does:

    servers = fleet.find()                      # all servers that answer, new and quarantined ones too
    ...a full sync of version v to all of them...
    fleet.admit(url, v)                         # for each server that has the weights
    fleet.quarantine(url, reason)               # for each server that failed

The methods may be called from several threads.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from megatron_rasft.config import RolloutConfig
from megatron_rasft.config.rollout import check_address
from megatron_rasft.errors import RolloutError, ServerError
from megatron_rasft.servers.addresses import read_addresses
from megatron_rasft.servers.fit import STARTING, duplicates, misfit
from megatron_rasft.servers.record import ServerRecord, ServerRecords

_PROBE_S = 30.0
"""Longest time a server may take to answer a probe, which does not generate tokens."""
_BETWEEN_PROBES_S = 2.0


class Fleet:
    """All servers that the flags and the server file name.

    Args:
        config: the rollout flags.
        known: the records of this process, shared with the weight sync.
        model_config: config.json of the trainer's model, which the servers must serve; None compares nothing.
        say: prints a line; called for each change.
    """

    def __init__(
        self,
        config: RolloutConfig,
        known: ServerRecords,
        *,
        model_config: dict[str, object] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.config = config
        self.api_key = known.keys.api_key
        self.say = say
        self._known = known
        self._model_config = model_config
        self._lock = threading.RLock()
        self._records: dict[str, ServerRecord] = {}
        self._has_waited = False
        self._last_read: list[str] | None = None
        """The addresses from the last successful reading of --rollout-server-file."""
        self._file_fault = ""

    @property
    def records(self) -> list[ServerRecord]:
        """Every server, including those that may not be sampled."""
        with self._lock:
            return list(self._records.values())

    def serving(self, weight_version: int) -> list[ServerRecord]:
        """Returns the servers that may be sampled with weights of this version."""
        return [r for r in self.records if r.weight_version == weight_version]

    @property
    def vocab_size(self) -> int | None:
        """The smallest vocabulary of the trainer's model and the servers' models; None if none is known."""
        configs = [self._model_config, *(r.info.model_config for r in self.records if r.info is not None)]
        sizes = [c.get("vocab_size") for c in configs if c is not None]
        return min((size for size in sizes if isinstance(size, int)), default=None)

    def find(self, check: Callable[[], None] = lambda: None) -> list[ServerRecord]:
        """Returns the servers that answer and fit, in the order of the flags and then of the file.

        Waits up to --rollout-wait-s: the first call for --rollout-min-servers, later calls for one server. With
        --rollout-without-servers demonstrations only the first call waits. It then continues with fewer servers, and returns [] if
        there is none.

        Args:
            check: called repeatedly during the wait; an error from it ends the wait.

        Raises:
            RolloutError: too few servers answered in time, and the run may not continue without servers.
            ValueError: --rollout-server-file cannot be read, and has never been read in this run.
        """
        is_error = self.config.rollout_without_servers == "error"
        num_needed = 1 if self._has_waited else self.config.rollout_min_servers
        waits = is_error or not self._has_waited
        ends = time.monotonic() + (self.config.rollout_wait_s if waits else 0.0)
        is_first_try = True
        while True:
            self._read_addresses()
            found = self._probe_all(is_silent=not is_first_try)
            if len(found) >= num_needed:
                self._has_waited = True
                return found
            left = ends - time.monotonic()
            if left <= 0:
                break
            if is_first_try:
                answer = (
                    f"{len(found)} of {num_needed} rollout servers answer"
                    if found
                    else "no rollout server answers"
                )
                self.say(f"{answer}; waiting up to {left:.0f} s")
                is_first_try = False
            check()
            time.sleep(min(_BETWEEN_PROBES_S, left))
        self._has_waited = True
        reasons = "; ".join(f"{r.url} {r.fault}" for r in self.records if r.fault) or (
            f"{self.config.rollout_server_file} is empty"
            if self.config.rollout_server_file
            else "no address is given"
        )
        if is_error:
            few = (
                f"{len(found)} of {num_needed} rollout servers (--rollout-min-servers)"
                if found
                else "no rollout server"
            )
            raise RolloutError(
                f"{few} answered within {self.config.rollout_wait_s:g} s (--rollout-wait-s): {reasons}. Start one "
                "with tools/serve_rollouts.py, or train on demonstrations meanwhile with --rollout-without-servers "
                "demonstrations."
            )
        if found:
            self.say(
                f"{len(found)} of {num_needed} rollout servers answer (--rollout-min-servers): continuing with them"
            )
            return found
        self.say(f"no rollout server ({reasons}): training on demonstrations alone")
        return []

    def lacking(self, weight_version: int, found: Sequence[ServerRecord]) -> list[str]:
        """Returns the addresses of the found servers that need a sync to get these weights.

        These are servers that were not admitted with these weights or whose label differs, and every server with a memory
        saver: it may have released its weights.
        """
        return [r.url for r in found if not _has_weights(r, weight_version)]

    def admit(self, url: str, weight_version: int) -> None:
        """Allows sampling from a server that has received and proven these weights."""
        with self._lock:
            record = self._records[url]
            if record.fault:
                self.say(f"rollout server {url} is back, with the weights of step {weight_version}")
            record.weight_version = weight_version
            record.fault = ""
            record.num_failures_in_row = 0

    def quarantine(self, url: str, reason: str) -> None:
        """Forbids sampling from a server until its next full sync. Repeating the same reason prints nothing."""
        with self._lock:
            record = self._records.get(url)
            if record is None or (record.weight_version is None and record.fault == reason):
                return
            was_serving = record.weight_version is not None
            record.weight_version = None
            record.fault = reason
        self.say(f"rollout server {url} {reason}{': left out for now' if was_serving else ''}")

    def _read_addresses(self) -> None:
        """Brings the list of servers up to date with the flags and the server file."""
        named = dict.fromkeys(check_address(url, "--rollout-urls") for url in self.config.rollout_urls)
        if self.config.rollout_server_file is not None:
            named |= dict.fromkeys(self._read_file(self.config.rollout_server_file))
        with self._lock:
            for url, record in self._records.items():
                if url not in named:
                    record.weight_version, record.fault, record.info = None, "", None
                    self.say(f"rollout server {url} has signed off")
            self._records = {url: self._known.get(url) for url in named}

    def _read_file(self, path: str) -> list[str]:
        """Returns the addresses in the file; the last readable ones if the file has been damaged during the run."""
        try:
            self._last_read, fault = read_addresses(path), ""
        except ValueError as error:
            if self._last_read is None:
                raise
            fault = str(error)
        if fault and fault != self._file_fault:
            self.say(f"--rollout-server-file {path} cannot be read, so the known servers are kept: {fault}")
        self._file_fault = fault
        return self._last_read

    def _probe_all(self, is_silent: bool) -> list[ServerRecord]:
        """Probes every server and returns those without a fault."""
        records = self.records
        if not records:
            return []
        with ThreadPoolExecutor(len(records)) as pool:
            faults = list(pool.map(self._probe, records))
        same = duplicates([r.info for r in records if r.info is not None])
        faults = [same.get(r.url, fault) for r, fault in zip(records, faults, strict=True)]
        for record, fault in zip(records, faults, strict=True):
            if not fault:
                continue
            record.info = None
            if is_silent or record.fault == fault:
                with self._lock:
                    record.weight_version, record.fault = None, fault
            else:
                self.quarantine(record.url, fault)
        return [r for r, fault in zip(records, faults, strict=True) if not fault]

    def _probe(self, record: ServerRecord) -> str:
        """Updates a record from a probe. Returns the server's fault; empty if the server can be synced."""
        record.info = None
        try:
            info = record.client.probe(_PROBE_S)
        except ServerError as error:
            return error.reason
        if record.weight_version is None and record.client.is_starting():
            return STARTING
        fault = misfit(info, self._model_config)
        if fault:
            return fault
        record.info = info
        limit = self.config.rollout_concurrency
        record.max_in_flight = min(limit, info.max_running_requests or limit)
        return ""


def _has_weights(record: ServerRecord, weight_version: int) -> bool:
    info = record.info
    return (
        record.weight_version == weight_version
        and info is not None
        and info.weight_version == weight_version
        and not info.has_memory_saver
    )
