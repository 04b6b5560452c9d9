"""Reports steps and refreshes: one line each on the console, all values in metrics.jsonl, TensorBoard and W&B."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from megatron_rasft import metrics
from megatron_rasft.files import written_to
from megatron_rasft.monitoring import live


class ScalarWriter(Protocol):
    """The methods of TensorBoard's SummaryWriter that are used here."""

    def add_scalar(self, name: str, value: float, step: int) -> None: ...
    def flush(self) -> None: ...


class Progress:
    """Reports of one rank. A file that cannot be written raises a RasftError on that rank alone.

    Args:
        total_steps: steps of the run.
        path: metrics.jsonl, to which lines are appended; None writes no file.
        tensorboard: Megatron's writer, or None.
        wandb: Megatron's Weights & Biases module, or None.
        is_silent: writes neither console lines nor metrics.jsonl; True on all ranks except 0. The trackers are on the last rank.
    """

    def __init__(
        self,
        total_steps: int,
        path: Path | None = None,
        tensorboard: ScalarWriter | None = None,
        wandb: Any | None = None,
        is_silent: bool = False,
    ) -> None:
        self._total = total_steps
        self._path = None if is_silent else path
        self._tensorboard = tensorboard
        self._wandb = wandb
        self._silent = is_silent
        self._console = Console(highlight=False, soft_wrap=True)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)

    def show_work(self, interval_s: float) -> None:
        """Shows long work until ``close``; see ``live.LiveLine``."""
        if not self._silent:
            live.start(self._console, interval_s)

    def say(self, text: str, style: str | None = None) -> None:
        """Prints a line."""
        if not self._silent:
            self._console.print(text, style=style, markup=False)

    def refresh(self, step: int, values: Mapping[str, float], text: str) -> None:
        """Reports a refresh: prints ``text`` and records the values."""
        self.say(text, style="cyan")
        self._record("refresh", step, values)

    def step(self, step: int, values: Mapping[str, float], note: str = "") -> None:
        """Reports a training step: records the values and prints the most important ones, and a note after them."""
        self._record("step", step, values)
        if self._silent:
            return
        parts = [f"step {step}/{self._total}"]
        for name, label, form in _STEP_LINE:
            if name in values and not math.isnan(values[name]):
                parts.append(f"{label} {values[name]:{form}}")
        phases = [f"{label} {values[name]:.2f}" for name, label in _STEP_PHASES if name in values]
        if phases:
            parts[-1] += f" ({', '.join(phases)})"
        self.say("  ".join([*parts, note] if note else parts))

    def close(self, exit_code: int = 0) -> None:
        """Stops to show work, and flushes the trackers' buffers to their files or servers.

        Args:
            exit_code: 0 after a run without an error, for Weights & Biases.
        """
        live.stop()
        if self._tensorboard is not None:
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.finish(exit_code)

    def _record(self, event: str, step: int, values: Mapping[str, float]) -> None:
        # JSON has neither NaN nor infinity.
        finite = {k: v for k, v in values.items() if math.isfinite(v)}
        if self._path is not None:
            with written_to(self._path, "--rasft-metrics"), self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"event": event, "step": step, "time": time.time(), **finite}) + "\n")
        if self._tensorboard is not None:
            for name, value in finite.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(finite, step)


_STEP_LINE = (
    (metrics.LOSS, "loss", ".4f"),
    (metrics.RATIO_MEAN, "ratio", ".3f"),
    (metrics.RATIO_CLIP_FRAC, "clipped", ".0%"),
    (metrics.DEMONSTRATION_WEIGHT, "demonstration", ".2f"),
    (metrics.ROLLOUT_WEIGHT, "rollout", ".2f"),
    (metrics.WRONG_ROLLOUT_WEIGHT, "wrong rollout", ".2f"),
    (metrics.SOLVE_RATE, "solved", ".1%"),
    (metrics.GRAD_NORM, "grad", ".3f"),
    (metrics.LEARNING_RATE, "lr", ".2e"),
    (metrics.NUM_SAMPLES, "samples", ".0f"),
    (metrics.QUEUE, "queue", ".0f"),
    (metrics.TOKENS_PER_S, "tok/s", ".0f"),
    (metrics.STEP_S, "s", ".2f"),
)
"""(metric, label, format) of each value in a step's console line. NaN and missing values are left out."""

_STEP_PHASES = (
    (metrics.DATA_S, "data"),
    (metrics.FORWARD_BACKWARD_S, "forward-backward"),
    (metrics.OPTIMIZER_S, "optimizer"),
)
"""(metric, label) of each phase listed in parentheses after the seconds of a step."""
