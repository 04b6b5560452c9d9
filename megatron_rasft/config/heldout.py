"""Knobs of the held-out solve rate that a run measures beside its training."""

from dataclasses import dataclass, field

from megatron_rasft.config.data import TRAIN_DATA_SUFFIXES


@dataclass(kw_only=True)
class HeldoutConfig:
    """Solve rate on problems that are not trained on, with the live weights and the run's verifier."""

    heldout_data: list[str] = field(default_factory=list)
    """Files of held-out problems, in the form of --train-data; measured before the first and after the last step."""

    heldout_interval: int = 0
    """Also measure every so many steps; 0: only before and after."""

    heldout_num_samples: int = 1
    """Responses per held-out problem, >= 1; the solve rate is their mean (avg@k)."""

    heldout_temperature: float = 0.0
    """Sampling temperature, >= 0; 0 takes the most likely token."""

    def __post_init__(self) -> None:
        for path in self.heldout_data:
            if not path.endswith(TRAIN_DATA_SUFFIXES):
                raise ValueError(
                    f"--heldout-data must be {', '.join(TRAIN_DATA_SUFFIXES)} files, got {path!r}: convert it."
                )
        repeated = sorted({path for path in self.heldout_data if self.heldout_data.count(path) > 1})
        if repeated:
            raise ValueError(f"--heldout-data must name each file once, got {repeated[0]!r} again.")
        if self.heldout_interval < 0:
            raise ValueError(
                f"--heldout-interval must be >= 0, got {self.heldout_interval}. 0 measures before and after."
            )
        if self.heldout_num_samples < 1:
            raise ValueError(f"--heldout-num-samples must be >= 1, got {self.heldout_num_samples}.")
        if self.heldout_temperature < 0:
            raise ValueError(
                f"--heldout-temperature must be >= 0, got {self.heldout_temperature}. 0 is greedy."
            )
        if self.heldout_num_samples > 1 and self.heldout_temperature == 0:
            raise ValueError(
                f"--heldout-num-samples {self.heldout_num_samples} at --heldout-temperature 0 would draw the same response "
                "each time. Use one sample, or a temperature above 0."
            )
