"""Rank 0's part of a weight sync: pauses the servers, decides which get which tensors, proves and releases the servers.

A ``ServerSession`` is plain single-process code. Its decisions are ``Attempt`` values, which ``push.py`` broadcasts, and its state
between syncs is the servers' records plus the few fields here.
"""

import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_rasft.config.sync import SyncConfig
from megatron_rasft.errors import ServerError
from megatron_rasft.servers.fit import misfit
from megatron_rasft.servers.info import released_memory, sleep_label
from megatron_rasft.servers.record import ServerRecord, ServerRecords, call_all
from megatron_rasft.sync.nccl_versions import Pair, objection, own_pair
from megatron_rasft.sync.report import SyncReport
from megatron_rasft.sync.streaming import Outcome, timed
from megatron_rasft.sync.weight_checks import Evidence, ProofKind, check_checksums, check_rows
from megatron_rasft.sync.wire_format import WireFormat

_MEMORY = ("weights", "kv_cache")
"""Kinds of memory that a sleeping server has released, in the order of resuming: weights first, before they are written."""

_KEPT_FOLDERS = 2
"""Number of versions kept in --sync-disk-folder: the version that the servers have, and the previous version."""

_CAN_READ_BACK = ("LlamaForCausalLM",)
"""Architectures for which SGLang implements /get_weights_by_name, among those that this package trains."""

_PROOF_NAMES: dict[ProofKind, str] = {
    "checksum": "checksums of every tensor",
    "read_back": "reading values back",
    "none": "",
}


@dataclass(frozen=True)
class Attempt:
    """Rank 0's decision about one attempt of a sync, the same on every rank."""

    servers: tuple[tuple[str, int], ...] = ()
    """Address and tensor-parallel size of each server to reach, in the order of their ranks."""
    group: str = ""
    """Name of the update groups. A new name makes the ranks create new groups."""
    wire_format: WireFormat = field(default_factory=lambda: WireFormat(torch.bfloat16))
    proof: ProofKind = "none"
    suspects: dict[str, str] = field(default_factory=dict)
    """Server whose NCCL probably differs from the trainer's -> reason. They are blamed if no other server has failed."""

    @property
    def urls(self) -> list[str]:
        return [url for url, _ in self.servers]

    @property
    def tp_sizes(self) -> list[int]:
        return [size for _, size in self.servers]


class ServerSession:
    """The servers of a run as the weight sync sees them, on rank 0.

    Args:
        config: the sync flags.
        records: the servers' records, shared with the fleet.
        model_config: config.json of the trainer's model, also used for servers whose own cannot be read here.
        device: device type of the trainer's parameters, ``cpu`` or ``cuda``.
        nccl: returns the trainer's versions of torch and NCCL.
    """

    def __init__(
        self,
        config: SyncConfig,
        records: ServerRecords,
        model_config: dict[str, Any],
        device: str,
        nccl: Callable[[], Pair] = own_pair,
    ) -> None:
        self._config = config
        self._timeout_s = config.sync_timeout_s
        self._records = records
        self._model_config = model_config
        self._device = device
        self._nccl = nccl
        self._noted: set[str] = set()
        """Lines about NCCL that this run has already printed."""
        self._members: list[tuple[str, int]] = []
        """Address and size of each server in the current update groups, in the order of their ranks."""
        self._group = ""
        self._sent_format: WireFormat | None = None
        """Format of the last successful sync."""
        self._syncs_since_proof: int | None = None
        """Successful syncs since the last proof that the weights arrived; None if the next sync must have one."""

    def prepare(self, urls: Sequence[str], report: SyncReport) -> Attempt:
        """Pauses the servers, opens their update sessions and decides what all ranks do.

        Servers that fail here or do not fit are entered in ``report`` and left out. An attempt without servers ends the sync.

        Raises:
            ValueError: at the first sync, if servers answer and none of them can be given this trainer's weights.
        """
        records = [self._records.get(url) for url in urls if url not in report.failed]
        records = self._call(records, self._probe, report)
        wire_format, records = self._choose_format(records, report)
        records = self._call(records, self._pause, report)
        if self._config.sync_method != "disk":
            records = self._call(records, self._begin, report)
        if wire_format is None or not records:
            return Attempt()
        self._choose_group(records)
        notes, suspects = self._compare_nccl(records)
        report.notes += notes
        report.num_attempts += 1
        return Attempt(
            tuple(self._members), self._group, wire_format, self._choose_proof(records, wire_format), suspects
        )

    def conclude(self, attempt: Attempt, outcome: Outcome, report: SyncReport) -> bool:
        """Releases the servers after a transfer, or decides which servers failed it. Returns whether the sync is over.

        If the sync is not over, everything must be sent again, over new groups, to the servers that have not failed.

        Raises:
            ValueError: the transfer failed for a reason that no server can be blamed for.
        """
        if outcome.refusal:
            raise ValueError(outcome.refusal)
        report.num_bytes, report.num_buckets = outcome.num_bytes, outcome.num_buckets
        for phase, seconds in outcome.seconds.items():
            report.seconds[phase] = report.seconds.get(phase, 0.0) + seconds
        if outcome.reason:
            self._quarantine(self._blamed(attempt, outcome, report), report)
            return False
        with timed(report.seconds, "release"):
            failed = self._release(attempt, outcome.evidence, report.weight_version)
        if failed:
            self._quarantine(failed, report)
        report.synced = [url for url in attempt.urls if url not in failed]
        report.proof = _PROOF_NAMES[attempt.proof] if report.synced else ""
        return True

    def load_folder(self, attempt: Attempt, folder: Path) -> Outcome:
        """Makes the servers load an exported folder, and deletes older exports (--sync-method disk)."""
        outcome = Outcome()
        with timed(outcome.seconds, "send"):
            outcome.failed = call_all(
                [self._records.get(url) for url in attempt.urls],
                lambda r: r.client.update_weights_from_disk(
                    folder, flush_cache=False, deadline_s=self._timeout_s
                ),
            )
        outcome.reason = next(iter(outcome.failed.values()), "")
        outcome.num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        outcome.num_buckets = 1
        exports = sorted(folder.parent.glob("weights-*"), key=lambda p: p.stat().st_mtime)
        for old in exports[:-_KEPT_FOLDERS]:
            shutil.rmtree(old, ignore_errors=True)
        return outcome

    def sleep(self, urls: Sequence[str]) -> dict[str, str]:
        """Makes servers release their GPU memory until the next sync or ``wake``. Running requests are aborted.

        Args:
            urls: servers started with --enable-memory-saver.

        Returns:
            url -> reason of the servers that failed.
        """
        return call_all([self._records.get(url) for url in urls], self._put_to_sleep)

    def wake(self) -> dict[str, str]:
        """Wakes sleeping servers without sending weights, at the end of a run.

        They stay paused, since the content of that memory is undefined. The first sync of the next run resumes them.

        Returns:
            url -> reason of the servers that failed.
        """
        asleep = [record for record in self._records if record.released]
        return call_all(asleep, lambda r: self._take_back(r, *_MEMORY))

    # ---- prepare

    def _probe(self, record: ServerRecord) -> None:
        """Updates a record's info."""
        record.info = record.client.probe(self._timeout_s)

    def _call(
        self, records: Sequence[ServerRecord], call: Callable[[ServerRecord], None], report: SyncReport
    ) -> list[ServerRecord]:
        """Calls all servers at the same time. Leaves out those that fail, and returns the others."""
        failed = call_all(records, call)
        self._leave_out(failed, report)
        return [record for record in records if record.url not in failed]

    def _choose_format(
        self, records: Sequence[ServerRecord], report: SyncReport
    ) -> tuple[WireFormat | None, list[ServerRecord]]:
        """Chooses the format to send, leaves out the servers that need another one, and returns the others.

        The format is None if no server can be given the weights.
        """
        formats, unfit = self._needed_formats(records)
        if not formats and unfit and self._sent_format is None:
            raise ValueError("; ".join(f"rollout server {url} {reason}" for url, reason in unfit.items()))
        wanted = list(formats.values())
        # One broadcast feeds all servers, so all get the same format: the last sync's, otherwise the most frequent format.
        chosen = self._sent_format
        if chosen not in wanted:
            chosen = max(wanted, key=wanted.count, default=None)
        for url, other in formats.items():
            if other != chosen:
                unfit[url] = (
                    f"serves a folder whose dtype or quantization_config differs from the other servers': it needs {other}, "
                    f"they need {chosen}. Serve the same folder on each."
                )
        self._leave_out(unfit, report)
        return chosen, [record for record in records if record.url not in unfit]

    def _needed_formats(
        self, records: Sequence[ServerRecord]
    ) -> tuple[dict[str, WireFormat], dict[str, str]]:
        """Returns url -> format of the servers that can be given the weights, and url -> reason of the others."""
        formats: dict[str, WireFormat] = {}
        unfit: dict[str, str] = {}
        for record in records:
            reason = misfit(record.known_info, self._model_config)
            if reason:
                unfit[record.url] = reason
                continue
            try:
                formats[record.url] = self._format_of(record)
            except ValueError as error:
                unfit[record.url] = str(error)
        return formats, unfit

    def _format_of(self, record: ServerRecord) -> WireFormat:
        """Returns the format that a server needs.

        Raises:
            ValueError: the trainer cannot produce it, or --sync-method or --sync-proof does not work with it.
        """
        info, folder = record.known_info, self._config.sync_disk_folder
        # After an update from disk a server reports the export as its model. Its tensors still have the types of the folder
        # that it was started with.
        if folder is None or not Path(info.model_path).is_relative_to(Path(folder).absolute()):
            record.start_config = info.model_config
        config = record.start_config or self._model_config
        if info.quantization and not config.get("quantization_config"):
            raise ValueError(
                f"quantizes the weights itself (--quantization {info.quantization}). Serve a folder whose config.json has the "
                "quantization_config instead, or leave the flag out."
            )
        wire_format = WireFormat.read(config, info.dtype)
        if wire_format.is_block_fp8 and self._config.sync_proof == "checksum":
            # SGLang hashes FP8 weights after dequantizing them
            raise ValueError(
                "serves FP8, for which SGLang's checksums differ from those of the sent bytes: --sync-proof checksum cannot succeed. "
                "Use --sync-proof auto, or serve a folder in bfloat16."
            )
        if wire_format.is_block_fp8 and self._config.sync_method == "disk":
            # the server would multiply the exported BF16 weights by the scales of the old FP8 weights
            raise ValueError(
                "serves FP8, but --sync-method disk exports weights that are not quantized. Use --sync-method broadcast, or "
                "serve a folder in bfloat16."
            )
        return wire_format

    def _pause(self, record: ServerRecord) -> None:
        """Pauses a server. A sleeping server first allocates the memory of its weights again."""
        released = released_memory(record.known_info.weight_label)
        if released is None:  # the server is awake; it may have been restarted
            record.released = None
        elif record.released is None:  # a killed run left the server asleep
            record.released = released
        mode = self._config.sync_pause_mode
        # SGLang before 0.5.21, the first version with update sessions, dies if it is updated while requests wait
        record.client.pause(mode if record.known_info.has_update_session else "abort", self._timeout_s)
        self._take_back(record, "weights")

    def _begin(self, record: ServerRecord) -> None:
        """Opens an update session. If one is already open, closes it first."""
        try:
            record.begin_update(self._timeout_s)
        except ServerError as error:
            if error.status is None:
                raise
            # an interrupted sync may have left a session open
            try:
                record.end_update(self._timeout_s)
            except ServerError:
                raise error from None
            record.begin_update(self._timeout_s)

    def _choose_group(self, records: Sequence[ServerRecord]) -> None:
        """Keeps the update groups if they consist of exactly these servers, all synced last time; otherwise names new groups."""
        members = [(record.url, record.known_info.tp_size) for record in records]
        if members == self._members and all(_is_as_left(record) for record in records):
            return
        self._members = members
        self._group = f"rasft-{uuid.uuid4().hex[:12]}"
        self._syncs_since_proof = None

    def _compare_nccl(self, records: Sequence[ServerRecord]) -> tuple[tuple[str, ...], dict[str, str]]:
        """Compares NCCL on both sides before the first collective. Returns lines to print, and url -> reason for doubt."""
        if self._device != "cuda" or self._config.sync_method != "broadcast":
            return (), {}
        own, suspects, lines = self._nccl(), dict[str, str](), list[str]()
        for record in records:
            if record.synced_version is not None:  # the server has connected before
                continue
            try:
                problem = objection(record.known_info.version, own)
            except LookupError as unknown:
                lines.append(str(unknown))
                continue
            if problem:
                suspects[record.url] = problem
                lines.append(f"rollout server {record.url}: {problem}")
        new = tuple(line for line in dict.fromkeys(lines) if line not in self._noted)
        self._noted.update(new)
        return new, suspects

    def _choose_proof(self, records: Sequence[ServerRecord], wire_format: WireFormat) -> ProofKind:
        interval, wanted = self._config.sync_proof_interval, self._config.sync_proof
        is_due = self._syncs_since_proof is None or (interval > 0 and self._syncs_since_proof + 1 >= interval)
        # SGLang hashes FP8 weights after dequantizing them, and /get_weights_by_name gives no scales
        if not is_due or wanted == "off" or (wanted == "auto" and wire_format.is_block_fp8):
            return "none"
        infos = [record.known_info for record in records]
        if wanted == "checksum" or (wanted == "auto" and self._device == "cpu"):
            return "checksum" if all(info.has_weights_checker for info in infos) else "none"
        can_read = all(set(info.architectures) & set(_CAN_READ_BACK) for info in infos)
        return "read_back" if can_read or wanted == "read_back" else "none"

    # ---- conclude

    def _blamed(self, attempt: Attempt, outcome: Outcome, report: SyncReport) -> dict[str, str]:
        """Returns the servers to which a failed transfer is attributed; {} to try again with all servers."""
        failed = outcome.failed or attempt.suspects
        if failed or report.num_attempts <= 1 + len(report.failed):
            return dict(failed)
        # the second failure that no server can be blamed for
        return dict.fromkeys(attempt.urls, outcome.reason)

    def _quarantine(self, failed: dict[str, str], report: SyncReport) -> None:
        """Leaves servers out of this sync. The next transfer uses new groups and is proven."""
        self._leave_out(failed, report)
        self._members = []

    def _leave_out(self, failed: dict[str, str], report: SyncReport) -> None:
        """Enters failed servers in the report, and marks them as outside the update groups."""
        report.failed.update(failed)
        for url in failed:
            self._records.get(url).synced_version = None

    def _release(self, attempt: Attempt, evidence: Evidence, weight_version: int) -> dict[str, str]:
        """Finalizes, proves, labels and resumes the servers. Servers that fail stay paused.

        Returns:
            url -> reason of the servers that failed.
        """
        records = [self._records.get(url) for url in attempt.urls]
        failed = call_all(records, lambda r: self._release_one(r, attempt.proof, evidence, weight_version))
        for record in records:
            record.synced_version = weight_version
            if record.url not in failed:
                self._sent_format = attempt.wire_format
        is_proven = attempt.proof != "none" or self._syncs_since_proof is None
        self._syncs_since_proof = 0 if is_proven else (self._syncs_since_proof or 0) + 1
        return failed

    def _release_one(
        self, record: ServerRecord, proof: ProofKind, evidence: Evidence, weight_version: int
    ) -> None:
        client, timeout_s = record.client, self._timeout_s
        if self._config.sync_method != "disk":
            record.end_update(timeout_s)
        self._take_back(record, "kv_cache")
        if self._config.sync_pause_mode != "in_place" or not record.known_info.has_update_session:
            client.flush_cache(timeout_s)
        if proof == "checksum":
            check_checksums(client, evidence.checksums[record.known_info.tp_size], timeout_s)
        elif proof == "read_back":
            check_rows(client, evidence.rows, timeout_s)
        client.set_weight_version(weight_version, timeout_s)
        found = client.weight_version(timeout_s)
        if found != weight_version:
            raise ServerError(
                record.url,
                f"reports the weights of step {found} after it was sent the weights of step {weight_version}",
            )
        client.resume(timeout_s)

    # ---- sleep and wake

    def _put_to_sleep(self, record: ServerRecord) -> None:
        held = [tag for tag in _MEMORY if tag not in (record.released or ())]
        if held:
            record.client.pause("abort", self._timeout_s)
            record.client.release_memory(held, self._timeout_s)
            record.released = list(_MEMORY)
            record.client.set_weight_label(sleep_label(_MEMORY), self._timeout_s)

    def _take_back(self, record: ServerRecord, *tags: str) -> None:
        """Makes a server allocate this memory again, unless it has the memory already."""
        released = record.released or []
        for tag in tags:
            if tag in released:
                record.client.resume_memory([tag], self._timeout_s)
                # recorded at once: SGLang ends with a KeyError if the same memory is requested twice
                released.remove(tag)
                record.client.set_weight_label(sleep_label(released), self._timeout_s)


def _is_as_left(record: ServerRecord) -> bool:
    """Returns whether a server is still in its group. Its label shows if it was restarted or got other weights."""
    if record.synced_version is None:
        return False
    # the label of a sleeping server does not hold a version
    return record.released is not None or record.synced_version == record.known_info.weight_version
