"""One line a step, one line a refresh, and every number in metrics.jsonl."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from megatron_rasft import metrics
from megatron_rasft.files import written_to


class ScalarWriter(Protocol):
    """TensorBoard's SummaryWriter, as far as it is used here."""

    def add_scalar(self, name: str, value: float, step: int) -> None: ...
    def flush(self) -> None: ...


class Progress:
    """Speaks for the whole run on one rank. What it cannot write is a RasftError, on that rank alone.

    Args:
        total_steps: of the run.
        path: metrics.jsonl to append to; None keeps none.
        tensorboard: Megatron's writer, or None.
        wandb: Megatron's Weights & Biases module, or None.
        is_silent: on every rank but one.
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

    def say(self, text: str, style: str | None = None) -> None:
        """A line about the run as a whole."""
        if not self._silent:
            self._console.print(text, style=style, markup=False)

    def refresh(self, step: int, values: Mapping[str, float], text: str) -> None:
        """A refresh is over: its numbers, and one line for the reader."""
        self.say(text, style="cyan")
        self._record("refresh", step, values)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """A training step is over."""
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
        self.say("  ".join(parts))

    def close(self, exit_code: int = 0) -> None:
        """Bring what the trackers hold to their files or servers, however the process ends.

        Args:
            exit_code: how the run ended, for Weights & Biases.
        """
        if self._tensorboard is not None:
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.finish(exit_code)

    def _record(self, event: str, step: int, values: Mapping[str, float]) -> None:
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
    (metrics.SOLVE_RATE, "solved", ".1%"),
    (metrics.GRAD_NORM, "grad", ".3f"),
    (metrics.LEARNING_RATE, "lr", ".2e"),
    (metrics.NUM_SAMPLES, "samples", ".0f"),
    (metrics.QUEUE, "queue", ".0f"),
    (metrics.TOKENS_PER_S, "tok/s", ".0f"),
    (metrics.STEP_S, "s", ".2f"),
)

_STEP_PHASES = (
    (metrics.DATA_S, "data"),
    (metrics.FORWARD_BACKWARD_S, "forward-backward"),
    (metrics.OPTIMIZER_S, "optimizer"),
)
"""Behind the seconds of a step: where they went."""
