"""The weight sync of all ranks: pause the servers, transfer the weights, prove them, release the servers.

Rank 0 has the ``ServerSession``: it makes every request to the servers except the data requests, and its decisions are broadcast.
On each pipeline stage the ranks of one replica gather that stage's tensors (``StageTransfer``), and the first of these ranks,
the sender, sends them. The stages take turns, so a server never receives two buckets at once.

If a transfer fails, every rank learns it from the exchange after the stage. The server at fault is left out, and everything is
sent again, over new groups, to the other servers.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_rasft.config.sync import SyncConfig
from megatron_rasft.ranks import gather_to_all, on_rank_zero, patient_group
from megatron_rasft.servers.record import ServerRecords
from megatron_rasft.sync.report import PeakMemory, SyncReport
from megatron_rasft.sync.session import Attempt, ServerSession
from megatron_rasft.sync.streaming import Outcome, timed
from megatron_rasft.sync.transfer import StageTransfer
from megatron_rasft.weights.gathering import ModelTensors

_MIB = 2**20


class WeightSync:
    """Sends this model's weights to the rollout servers. Every rank of the world creates one and calls it together.

    Args:
        config: the sync flags.
        tensors: the model's tensors. The first rank of a stage that takes part is its sender.
        records: the servers' records of this process, on rank 0 shared with the fleet.
        model_config: config.json of the model.
        device: the device of the parameters.
        export: writes the model as a Hugging Face folder; a collective of all ranks. Needed for --sync-method disk.

    Raises:
        ValueError: --sync-address is not an address of every node that sends; or --sync-proof checksum on GPUs.
    """

    def __init__(
        self,
        config: SyncConfig,
        tensors: ModelTensors,
        *,
        records: ServerRecords,
        model_config: dict[str, Any],
        device: torch.device,
        export: Callable[[str], None] | None = None,
    ) -> None:
        if config.sync_method == "disk" and export is None:
            raise ValueError("--sync-method disk needs an export function.")
        if config.sync_proof == "checksum" and device.type == "cuda":
            # tensor_hash in srt/managers/mm_utils.py: sha256 of the bytes on a CPU, the hash of a kernel on a GPU
            raise ValueError(
                "--sync-proof checksum works with servers on a CPU only: on a GPU SGLang calculates another hash, which the "
                "trainer cannot reproduce. Use --sync-proof auto."
            )
        self._config = config
        self._device = device
        self._tensors = tensors
        self._export = export
        self._session = ServerSession(config, records, model_config, device.type)
        self.transfer = StageTransfer(
            config,
            tensors,
            records=records,
            model_config=model_config,
            device=device,
            ranks=_stage_group(config, tensors),
        )
        problem = next(filter(None, _gather(self.transfer.address_problem())), "")
        if problem:
            raise ValueError(problem)

    def describe(self) -> str:
        """Returns a line about the memory that a sync takes, for the start of a run. A collective of the world."""
        mine = (0, 0, "")
        if self.transfer.is_sender:
            memory = self.transfer.memory_plan()
            largest = max(memory.buckets, key=lambda bucket: bucket.num_bytes)
            mine = (memory.peak_bytes, largest.num_bytes, largest.hf_names[0])
        peak, largest_bytes, name = max(_gather(mine))
        text = f"a weight sync takes up to {peak / _MIB:.0f} MiB of a sending rank's memory"
        if largest_bytes > self._config.sync_bucket_mib * _MIB:
            text += (
                f": {name} and the tensors sent with it have {largest_bytes / _MIB:.0f} MiB, more than --sync-bucket-mib "
                f"{self._config.sync_bucket_mib}, and get a bucket of their own"
            )
        return text

    def push(self, weight_version: int, urls: Sequence[str] = ()) -> SyncReport:
        """Sends the current weights to the servers. A collective of the world, between steps; the parameters must be current.

        Returns the same report on every rank when each server has the weights or has failed. The number of attempts is at most
        the number of failing servers plus one, and each step of an attempt ends within --sync-timeout-s.

        Args:
            weight_version: optimizer steps done; becomes the servers' version label.
            urls: the servers to reach; read on rank 0.

        Raises:
            ValueError: this trainer cannot send its weights, or at the first sync no server that answers can be given them. The
                message says what to change. Raised on rank 0; the other ranks raise FailedElsewhere.
        """
        began = time.monotonic()
        report = SyncReport(weight_version=weight_version)
        memory = PeakMemory(self._device, self.transfer.num_kept_bytes)
        is_over = False
        while not is_over:
            is_over = self._try(report, urls)
        peak_bytes = max(_gather(memory.peak_bytes()))
        report = on_rank_zero(lambda: report)
        report.peak_bytes = peak_bytes
        report.seconds["total"] = time.monotonic() - began
        return report

    def _try(self, report: SyncReport, urls: Sequence[str]) -> bool:
        """Makes one attempt with the servers that have not failed. Returns whether the sync is over."""
        with timed(report.seconds, "pause"):
            self.empty_cache()
            attempt = on_rank_zero(lambda: self._session.prepare(urls, report))
        if not attempt.servers:
            return True
        with timed(report.seconds, "transfer"):
            outcome = self._transfer_stages(attempt, report.weight_version)
        self.empty_cache()  # before servers allocate their KV cache again
        return on_rank_zero(lambda: self._session.conclude(attempt, outcome, report))

    def _transfer_stages(self, attempt: Attempt, weight_version: int) -> Outcome:
        """Transfers the weights of one stage after the other. Every rank returns the same outcome."""
        total = Outcome()
        if self._config.sync_method == "disk":
            total.merge(self._load_from_disk(attempt, weight_version))
            if total.reason or attempt.proof == "none":
                return total
        for stage in range(self._tensors.num_stages):
            mine = None
            if self._tensors.takes_part and self._tensors.stage == stage:
                mine = self.transfer.run(attempt)
            for outcome in _gather(mine if self.transfer.is_sender else None):
                if outcome is not None:
                    total.merge(outcome)
            if total.reason:
                break
        return total

    def _load_from_disk(self, attempt: Attempt, weight_version: int) -> Outcome:
        """Exports the model and makes the servers load the folder. A collective of the world."""
        assert self._export is not None and self._config.sync_disk_folder is not None
        name = on_rank_zero(lambda: f"weights-{weight_version:08d}-{uuid.uuid4().hex[:8]}")
        folder = (Path(self._config.sync_disk_folder) / name).absolute()
        exporting = Outcome()
        with timed(exporting.seconds, "export"):
            self._export(str(folder))
        outcome = on_rank_zero(lambda: self._session.load_folder(attempt, folder))
        outcome.merge(exporting)
        return outcome

    def empty_cache(self, *, waits: bool = True) -> None:
        """Frees the memory that torch's allocator keeps, for servers on the same GPUs (--sync-method tensor).

        A server ends if too little memory is free when it takes its memory back.

        Args:
            waits: waits until every rank has freed its memory; a collective of the world.
        """
        if self._config.sync_method != "tensor":
            return
        if self._device.type == "cuda":
            torch.cuda.ipc_collect()  # frees the memory of buckets that servers have read
        torch.cuda.empty_cache()
        if waits:
            _gather(None)

    def sleep(self, urls: Sequence[str] = ()) -> dict[str, str]:
        """Makes colocated servers release their GPU memory until the next ``push``. A collective of the world.

        Args:
            urls: servers started with --enable-memory-saver; read on rank 0. Running requests are aborted.

        Returns:
            url -> reason of the servers that failed.
        """
        return on_rank_zero(lambda: self._session.sleep(urls))

    def wake(self) -> dict[str, str]:
        """Wakes sleeping servers without sending weights. Call it on rank 0 only; see ServerSession.wake."""
        return self._session.wake()

    def close(self) -> None:
        """Leaves the servers' update groups, one stage after the other. A collective of the world."""
        for stage in range(self._tensors.num_stages):
            if self._tensors.stage == stage:
                self.transfer.leave_group()
            _gather(None)


def _stage_group(config: SyncConfig, tensors: ModelTensors) -> ProcessGroup | None:
    """Returns the gloo group of the ranks that gather this rank's stage; None if this rank does not gather, or gathers alone.

    A collective of the world. The ranks of a stage wait in this group for their sender, each of whose steps has a deadline.
    """
    patience = timedelta(seconds=max(1800.0, 60 * config.sync_timeout_s))
    places = _gather((tensors.stage, tensors.takes_part))
    if len(places) == 1:
        return None
    own: ProcessGroup | None = None
    for number in range(tensors.num_stages):
        ranks = [rank for rank, place in enumerate(places) if place == (number, True)]
        group: Any = dist.new_group(ranks, backend="gloo", timeout=patience)
        if dist.get_rank() in ranks:
            own = group
    return own


def _gather[T](value: T) -> list[T]:
    """Returns every rank's value on every rank. Ranks may wait for a whole stage here, so it uses the patient group."""
    return gather_to_all(value, patient_group() if dist.is_initialized() else None)
