"""The figures of benchmarks/step_profile.py for events with known times."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from benchmarks.step_profile import LABEL, busy_us, figures_of


def event(name: str, start: float, end: float, device: DeviceType = DeviceType.CUDA) -> Any:
    return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end))


def test_gap_and_idle_share_are_those_of_the_kernels() -> None:
    """Kernels from 4000 to 6000, 5000 to 7000 (another stream) and 8000 to 9000: idle for one of five milliseconds."""
    figures = figures_of(
        [
            event(LABEL, 1000, 11000, DeviceType.CPU),
            event("aten::mm", 2000, 3000, DeviceType.CPU),
            event(LABEL, 4000, 9000),  # the device's span of the label itself, which is not a kernel
            event("gemm", 8000, 9000),
            event("gemm", 4000, 6000),
            event("norm", 5000, 7000),
        ]
    )
    assert figures == {
        "step_ms": 10.0,
        "num_kernels": 3,
        "first_kernel_after_ms": 3.0,
        "idle_frac": 0.2,
        "kernels_ms": {"gemm": 3.0, "norm": 2.0},
    }


def test_profile_without_kernels_says_so() -> None:
    figures = figures_of([event(LABEL, 0, 5000, DeviceType.CPU)])
    assert figures == {"step_ms": 5.0, "num_kernels": 0, "first_kernel_after_ms": None, "idle_frac": None}


@pytest.mark.parametrize(
    ("spans", "length"),
    [([], 0), ([(0, 2), (1, 3)], 3), ([(5, 6), (0, 1)], 2), ([(0, 10), (2, 3)], 10)],
)
def test_busy_time_counts_overlaps_once(spans: list[tuple[float, float]], length: float) -> None:
    assert busy_us(spans) == length
