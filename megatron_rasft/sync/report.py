"""The report of one weight sync for log and metrics, and the measurement of its memory."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_rasft import metrics
from megatron_rasft.wording import counted

_GIB = 2**30


@dataclass(kw_only=True)
class SyncReport:
    """The result of one sync, the same on every rank."""

    weight_version: int
    synced: list[str] = field(default_factory=list)
    """Servers that have all new weights."""
    failed: dict[str, str] = field(default_factory=dict)
    """Failed server -> reason. They may have a mixture of weights, and stay paused until a sync succeeds."""
    notes: tuple[str, ...] = ()
    """Lines to print that this run has not printed before."""
    num_attempts: int = 0
    num_bytes: int = 0
    """Bytes sent to each server in the last attempt."""
    num_buckets: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """Phase -> seconds, summed over all attempts. ``gather`` and ``send`` overlap, so their sum can be larger than the elapsed
    time ``transfer``."""
    peak_bytes: int = 0
    """Peak memory of a rank during the sync, minus its memory before; the largest over all ranks."""
    proof: str = ""
    """The kind of proof; empty if this sync was not proven."""

    @property
    def gb_per_s(self) -> float:
        """Decimal gigabytes per second during the transfer."""
        transfer = self.seconds.get("transfer", 0.0)
        return self.num_bytes / 1e9 / transfer if transfer else 0.0

    def values(self) -> dict[str, float]:
        """Returns metric name -> value."""
        phases = {f"sync/{phase}_s": value for phase, value in self.seconds.items()}
        return phases | {
            metrics.SYNC_GB: self.num_bytes / 1e9,
            metrics.SYNC_GB_PER_S: self.gb_per_s,
            metrics.SYNC_PEAK_GIB: self.peak_bytes / _GIB,
            metrics.SYNC_SERVERS: len(self.synced),
            metrics.SYNC_FAILED_SERVERS: len(self.failed),
        }

    def line(self) -> str:
        """Returns the report in one line."""
        phases = " ".join(f"{phase} {value:.2f}" for phase, value in self.seconds.items() if phase != "total")
        text = (
            f"weights of step {self.weight_version} on {counted(len(self.synced), 'server')} in {self.seconds.get('total', 0.0):.2f} s "
            f"({phases}): {self.num_bytes / 1e9:.3f} GB in {counted(self.num_buckets, 'bucket')}, {self.gb_per_s:.2f} GB/s, "
            f"peak {self.peak_bytes / _GIB:.2f} GiB"
        )
        if self.proof:
            text += f", proven by {self.proof}"
        if self.num_attempts > 1:
            text += f", {self.num_attempts} attempts"
        for url, reason in self.failed.items():
            text += f"; left out {url}: {reason}"
        return text


class PeakMemory:
    """Measures how far this process's memory grows above its present size: allocated on the GPU, or else resident in RAM.

    Args:
        num_kept: bytes that are allocated now but belong to the measured work, and count as part of it.
    """

    def __init__(self, device: torch.device, num_kept: int = 0) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self._steady = self._read("VmRSS", "allocated_bytes.all.current") - num_kept

    def _read(self, of_ram: str, of_gpu: str) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_stats(self._device)[of_gpu]
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(of_ram + ":"):
                return int(line.split()[1]) * 1024
        return 0

    def peak_bytes(self) -> int:
        """Returns the growth since the start, in bytes."""
        return max(0, self._read("VmHWM", "allocated_bytes.all.peak") - self._steady)
