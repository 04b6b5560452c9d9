"""Flags of the held-out solve rate, which a run measures during training."""

from dataclasses import dataclass, field

from megatron_rasft.config.data import check_data_files
from megatron_rasft.flags import FlagSection, NonNegativeFloat, NonNegativeInt, PositiveInt


@dataclass(kw_only=True)
class HeldoutConfig(FlagSection):
    """Solve rate of the policy on problems that are not trained on, graded by the verifier of the run."""

    heldout_data: list[str] = field(default_factory=list)
    """Files of held-out problems, in the format of --train-data. The solve rate is measured before the first and after the last
    step."""

    heldout_interval: NonNegativeInt = 0
    """Steps between further measurements; 0 makes no further ones."""

    heldout_num_samples: PositiveInt = 1
    """Responses per held-out problem; the solve rate is their mean (avg@k)."""

    heldout_temperature: NonNegativeFloat = 0.0
    """Sampling temperature; 0 takes the most likely token."""

    def check(self) -> None:
        check_data_files(self, "heldout_data", "For several responses per problem use --heldout-num-samples.")
        if self.heldout_num_samples > 1 and self.heldout_temperature == 0:
            raise self.refusal(
                "heldout_num_samples",
                "at --heldout-temperature 0 would give the same response each time. Use one sample, or a temperature above 0.",
            )
