"""What one weight sync did, for the log; and how its memory is measured."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_rasft import metrics

_GIB = 2**30


@dataclass(kw_only=True)
class SyncReport:
    """One sync, the same on every rank."""

    weight_version: int
    synced: list[str] = field(default_factory=list)
    """Servers that have the new weights, whole."""
    failed: dict[str, str] = field(default_factory=dict)
    """Servers that do not, and why: they may hold a mixture, and stay paused until a sync reaches them."""
    notes: tuple[str, ...] = ()
    """Lines for the reader that this run has not had before."""
    num_attempts: int = 0
    num_bytes: int = 0
    """Sent in the last attempt, once per server."""
    num_buckets: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """Phase -> seconds, of all attempts together. The stages' ``gather`` and ``send`` overlap, so they may add up to
    more than ``transfer``, which is their time on the clock."""
    peak_bytes: int = 0
    """Memory over the steady state on the rank where that was most."""
    proof: str = ""
    """How the weights were proven; empty if this sync was not."""

    @property
    def gb_per_s(self) -> float:
        """Decimal gigabytes per second while weights were on their way."""
        transfer = self.seconds.get("transfer", 0.0)
        return self.num_bytes / 1e9 / transfer if transfer else 0.0

    def values(self) -> dict[str, float]:
        """Metric name -> value."""
        phases = {f"sync/{phase}_s": value for phase, value in self.seconds.items()}
        return phases | {
            metrics.SYNC_GB: self.num_bytes / 1e9,
            metrics.SYNC_GB_PER_S: self.gb_per_s,
            metrics.SYNC_PEAK_GIB: self.peak_bytes / _GIB,
            metrics.SYNC_SERVERS: len(self.synced),
            metrics.SYNC_FAILED_SERVERS: len(self.failed),
        }

    def line(self) -> str:
        """The sync in one line."""
        phases = " ".join(f"{phase} {value:.2f}" for phase, value in self.seconds.items() if phase != "total")
        text = (
            f"weights of step {self.weight_version} on {len(self.synced)} server(s) in {self.seconds.get('total', 0.0):.2f} s "
            f"({phases}): {self.num_bytes / 1e9:.3f} GB in {self.num_buckets} bucket(s), {self.gb_per_s:.2f} GB/s, "
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
    """The most memory this process held beyond what it holds now: of the GPU, else resident in RAM.

    Args:
        num_resting: bytes of what it holds now that it only keeps for what is measured, and that count as part of that.
    """

    def __init__(self, device: torch.device, num_resting: int = 0) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts over from now
        self._steady = self._read("VmRSS", "allocated_bytes.all.current") - num_resting

    def _read(self, of_ram: str, of_gpu: str) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_stats(self._device)[of_gpu]
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(of_ram + ":"):
                return int(line.split()[1]) * 1024
        return 0

    def peak_bytes(self) -> int:
        return max(0, self._read("VmHWM", "allocated_bytes.all.peak") - self._steady)
