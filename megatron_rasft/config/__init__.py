"""The flags of a run: one dataclass per package, checked when it is created. Needs neither torch nor a GPU."""

from dataclasses import asdict, dataclass, field
from typing import Any, Self

from megatron_rasft.config.curriculum import CurriculumConfig
from megatron_rasft.config.data import DataConfig
from megatron_rasft.config.heldout import HeldoutConfig
from megatron_rasft.config.loss import LossConfig
from megatron_rasft.config.rollout import RolloutConfig
from megatron_rasft.config.run import RunConfig
from megatron_rasft.config.sync import SyncConfig
from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.flags import FlagSection
from megatron_rasft.objective.declaration import Objective
from megatron_rasft.objective.families import OBJECTIVES, flag_sections
from megatron_rasft.objective.families.rasft import Rasft
from megatron_rasft.objective.weighting import ADAPTIVE_ONLY, WeightingConfig

__all__ = [
    "CurriculumConfig",
    "DataConfig",
    "HeldoutConfig",
    "LossConfig",
    "RasftConfig",
    "RolloutConfig",
    "RunConfig",
    "SyncConfig",
    "VerifyConfig",
    "WeightingConfig",
]


@dataclass(kw_only=True)
class RasftConfig:
    """The flags that this package adds to Megatron's."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    objective: Objective = field(default_factory=Rasft)
    """The objective that ``loss.objective`` names, with its flags."""
    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)

    def __post_init__(self) -> None:
        if self.objective.trains_on == "rollouts" and not self.samples_rollouts:
            raise ValueError(
                f"--objective {self.objective.name} trains on rollouts only, and --curriculum-mode off samples none. Use "
                "--curriculum-mode all."
            )
        if self.objective.teacher() is not None and self.rollout.rollout_temperature == 0:
            raise self.rollout.refusal(
                "rollout_temperature",
                f"must be above 0 with --objective {self.objective.name}, whose gradient is that of a KL only on responses that are "
                "drawn from the policy. The default is 1.",
            )
        self._check_adaptive_flags()

    def _check_adaptive_flags(self) -> None:
        weighting, objective = self.weighting, self.objective
        rule = f"--objective {objective.name}"
        if objective.name == "rasft":
            rule = f"--rasft-weighting {weighting.rasft_weighting}"
        if not self._is_adaptive:
            for name in ADAPTIVE_ONLY:
                if getattr(weighting, name) != WeightingConfig.flag_fields()[name]:
                    raise weighting.refusal(
                        name,
                        f"has no effect with {rule}. Leave it out, or use --objective rasft with --rasft-weighting adaptive.",
                    )
            if self.rollout.rollout_guided_samples:
                raise self.rollout.refusal(
                    "rollout_guided_samples",
                    f"has no effect with {rule}. Leave it out, or use --objective rasft with --rasft-weighting adaptive.",
                )
        elif self.rollout.rollout_guided_samples and not weighting.weighting_rollout_total:
            raise self.rollout.refusal(
                "rollout_guided_samples",
                "chooses between demonstrations and the policy's own solutions, and --weighting-rollout-total 0 trains on no own solution. "
                "Leave out one of them.",
            )
        if (
            weighting.weighting_wrong_total
            and isinstance(objective, Rasft)
            and not objective.objective_dft_factor
        ):
            raise weighting.refusal(
                "weighting_wrong_total",
                "needs the DFT factor: without it the loss of a wrong rollout has no lower bound. Leave out "
                "--no-objective-dft-factor, or use --weighting-wrong-total 0.",
            )

    @classmethod
    def sections(cls) -> dict[str, type[FlagSection]]:
        """Title of each group of flags -> its dataclass."""
        objectives = {f"objective {names}": kind for names, kind in flag_sections().items()}
        return {
            "run": RunConfig,
            "data": DataConfig,
            "curriculum": CurriculumConfig,
            "rollouts": RolloutConfig,
            "weight sync": SyncConfig,
            "verification": VerifyConfig,
            "weighting": WeightingConfig,
            "objective": LossConfig,
            **objectives,
            "held-out solve rate": HeldoutConfig,
        }

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Reads the flags from parsed arguments.

        Raises:
            ValueError: a value is refused; the message names the flag, the rule and the way out.
        """
        # Built for all objectives, so that a wrong value is refused even if the run does not use its objective.
        objectives = {name: kind.from_args(args) for name, kind in OBJECTIVES.items()}
        return cls(
            run=RunConfig.from_args(args),
            data=DataConfig.from_args(args),
            curriculum=CurriculumConfig.from_args(args),
            rollout=RolloutConfig.from_args(args),
            sync=SyncConfig.from_args(args),
            verify=VerifyConfig.from_args(args),
            weighting=WeightingConfig.from_args(args),
            loss=LossConfig.from_args(args),
            objective=objectives[args.objective],
            heldout=HeldoutConfig.from_args(args),
        )

    @property
    def _is_adaptive(self) -> bool:
        return self.objective.name == "rasft" and self.weighting.rasft_weighting == "adaptive"

    @property
    def scales_lr_by_mass(self) -> bool:
        """Whether a step's learning rate is multiplied by its mass (--weighting-lr-by-mass)."""
        return self._is_adaptive and self.weighting.weighting_lr_by_mass

    @property
    def num_guided_samples(self) -> int:
        """--rollout-guided-samples, or its default for this objective and K."""
        given = self.rollout.rollout_guided_samples
        if given is not None:
            return given
        has_choice = self._is_adaptive and self.weighting.weighting_rollout_total > 0
        return min(int(has_choice), self.rollout.most_guided_samples)

    @property
    def samples_rollouts(self) -> bool:
        """Whether this run samples rollouts."""
        return self.objective.uses_rollouts() and self.curriculum.curriculum_mode != "off"

    @property
    def grades_rollouts(self) -> bool:
        """Whether this run grades its rollouts, so that its rows need an answer or tests."""
        return self.samples_rollouts and self.objective.needs_verdicts

    @property
    def samples_from_servers(self) -> bool:
        """Whether rollout servers sample this run's rollouts."""
        return self.samples_rollouts and self.rollout.rollout_engine == "sglang"

    @property
    def verifies(self) -> bool:
        """Whether this run grades anything: rollouts or held-out problems."""
        return self.grades_rollouts or bool(self.heldout.heldout_data)

    def as_dict(self) -> dict[str, Any]:
        """The values of the flags by section. Only the chosen objective's flags are included."""
        sections = asdict(self)
        # Name and flags of the objective share a section in config.json, because its readers look them up together.
        sections["objective"] |= sections.pop("loss")
        return sections
