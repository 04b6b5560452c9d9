"""The configuration: one dataclass per room, checked once, importable without torch or a GPU."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_rasft.config.curriculum import CurriculumConfig
from megatron_rasft.config.data import DataConfig
from megatron_rasft.config.heldout import HeldoutConfig
from megatron_rasft.config.objective import ObjectiveConfig
from megatron_rasft.config.rollout import RolloutConfig
from megatron_rasft.config.run import RunConfig
from megatron_rasft.config.sync import SyncConfig
from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.config.weighting import WeightingConfig

__all__ = [
    "CurriculumConfig",
    "DataConfig",
    "HeldoutConfig",
    "ObjectiveConfig",
    "RasftConfig",
    "RolloutConfig",
    "RunConfig",
    "SyncConfig",
    "VerifyConfig",
    "WeightingConfig",
]


@dataclass(kw_only=True)
class RasftConfig:
    """Everything this package adds to Megatron's own arguments."""

    run: RunConfig
    data: DataConfig
    curriculum: CurriculumConfig
    rollout: RolloutConfig
    sync: SyncConfig
    verify: VerifyConfig
    weighting: WeightingConfig
    objective: ObjectiveConfig
    heldout: HeldoutConfig

    def __post_init__(self) -> None:
        if self.weighting.weighting_skip_degenerate is None:
            self.weighting.weighting_skip_degenerate = self.objective.objective_grpo_dapo

    @classmethod
    def rooms(cls) -> dict[str, type]:
        """Room name -> its dataclass."""
        return {f.name: f.type for f in fields(cls)}  # type: ignore[misc]

    @classmethod
    def from_args(cls, args: Any) -> "RasftConfig":
        """Read the tree back from parsed arguments.

        Raises:
            ValueError: a value is out of range; the message names the flag, the rule and the way out.
        """
        config = cls(
            **{
                room: kind(**{f.name: getattr(args, f.name) for f in fields(kind)})
                for room, kind in cls.rooms().items()
            }
        )
        config.check()
        return config

    @property
    def samples_rollouts(self) -> bool:
        """Whether this run asks a rollout engine for anything."""
        return self.objective.uses_rollouts() and self.curriculum.curriculum_mode != "off"

    @property
    def verifies(self) -> bool:
        """Whether this run grades anything: rollouts or held-out problems."""
        return self.samples_rollouts or bool(self.heldout.heldout_data)

    def check(self) -> None:
        """Rules between rooms."""
        if self.objective.objective in ("raft", "grpo") and not self.samples_rollouts:
            raise ValueError(
                f"--objective {self.objective.objective} trains on rollouts only, and --curriculum-mode off takes none. "
                "Use --curriculum-mode all."
            )

    def as_dict(self) -> dict[str, Any]:
        """The tree as plain values, room by room."""
        return asdict(self)
