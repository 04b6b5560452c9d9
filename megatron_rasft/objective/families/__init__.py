"""The objectives, one file per family. The files import no torch; see ``declaration.py``."""

from inspect import get_annotations

from megatron_rasft.objective.declaration import Objective
from megatron_rasft.objective.families.importance_weighted import IwSft
from megatron_rasft.objective.families.kl_regularised import Asft, SftKl
from megatron_rasft.objective.families.likelihood import Dft, Raft, Sft
from megatron_rasft.objective.families.policy_ratio import Grpo, Psft
from megatron_rasft.objective.families.rasft import Rasft
from megatron_rasft.objective.families.self_distillation import Sdft
from megatron_rasft.objective.families.token_selective import Gft, Profit

OBJECTIVES: dict[str, type[Objective]] = {
    kind.name: kind for kind in (Rasft, Sft, SftKl, Dft, Asft, Profit, IwSft, Psft, Gft, Raft, Grpo, Sdft)
}
"""Value of --objective -> its class, in the order in which --help lists them."""


def describe_objectives() -> str:
    """One sentence per objective for --help, from the classes' docstrings."""
    return " ".join(
        f"{name}: {(kind.__doc__ or '').partition(chr(10))[0]}" for name, kind in OBJECTIVES.items()
    )


def flag_sections() -> dict[str, type[Objective]]:
    """The names of the objectives that share some flags (``sft_kl, asft``) -> the class that declares these flags."""
    names: dict[type[Objective], list[str]] = {}
    for name, kind in OBJECTIVES.items():
        for base in kind.__mro__:
            declares_flags = (
                bool(get_annotations(base)) and issubclass(base, Objective) and base is not Objective
            )
            if declares_flags:
                names.setdefault(base, []).append(name)
    return {", ".join(sharing): base for base, sharing in names.items()}
