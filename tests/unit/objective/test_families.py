"""The table of the objectives, as --help shows it."""

from megatron_rasft.objective.families import OBJECTIVES, describe_objectives, flag_sections
from megatron_rasft.objective.families.importance_weighted import IwSft
from megatron_rasft.objective.families.kl_regularised import KLRegularised
from megatron_rasft.objective.families.likelihood import Raft
from megatron_rasft.objective.families.policy_ratio import Grpo, Psft
from megatron_rasft.objective.families.rasft import Rasft
from megatron_rasft.objective.families.self_distillation import Sdft
from megatron_rasft.objective.families.token_selective import Gft, Profit


def test_flags_are_grouped_by_the_objectives_that_share_them() -> None:
    assert list(flag_sections().items()) == [
        ("rasft", Rasft),
        ("sft_kl, asft", KLRegularised),
        ("profit", Profit),
        ("iw_sft", IwSft),
        ("psft", Psft),
        ("gft", Gft),
        ("raft", Raft),
        ("grpo", Grpo),
        ("sdft", Sdft),
    ]


def test_help_has_the_first_line_of_each_docstring() -> None:
    rest = describe_objectives()
    for name, kind in OBJECTIVES.items():
        sentence = f"{name}: {str(kind.__doc__).splitlines()[0]}"
        assert rest.startswith(sentence), name
        rest = rest[len(sentence) :].removeprefix(" ")
    assert not rest
