"""The flags of a run and of the tools: ranges, rules between flags, documentation, and reading back."""

import math
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_rasft.config import (
    CurriculumConfig,
    DataConfig,
    HeldoutConfig,
    RasftConfig,
    RolloutConfig,
    SyncConfig,
)
from megatron_rasft.config.parser import add_flags
from megatron_rasft.flags import FlagSection, OneOf, Range, flag_name
from megatron_rasft.objective.families.policy_ratio import Grpo
from megatron_rasft.tools.capacity.config import AssumptionConfig, CapacityConfig
from megatron_rasft.tools.evaluation.config import EvaluationConfig
from megatron_rasft.training.arguments import add_arguments
from megatron_rasft.training.refresh import sampling_params

SECTIONS = {
    **RasftConfig.sections(),
    "evaluate": EvaluationConfig,
    "plan": CapacityConfig,
    "assumed": AssumptionConfig,
}
STEP = 1e-3


def parse(*flags: str) -> Namespace:
    return add_arguments(ArgumentParser()).parse_args(list(flags))


# ranges


def refused(rule: Range | OneOf) -> Iterator[Any]:
    """Values just outside a rule."""
    if isinstance(rule, OneOf):
        yield "another"
        return
    yield math.nan
    for bound, outside in ((rule.at_least, -STEP), (rule.above, 0), (rule.at_most, STEP), (rule.below, 0)):
        if bound is not None:
            yield bound + outside


def accepted(rule: Range | OneOf) -> Iterator[Any]:
    """Values just inside a rule."""
    if isinstance(rule, OneOf):
        yield from rule.values
        return
    for bound, inside in ((rule.at_least, 0), (rule.above, STEP), (rule.at_most, 0), (rule.below, -STEP)):
        if bound is not None and math.isfinite(bound):
            yield bound + inside


RULES = [(kind, name, rule) for kind in SECTIONS.values() for name, rule in kind.rules().items()]


@pytest.mark.parametrize(("kind", "name", "rule"), RULES, ids=[name for _, name, _ in RULES])
def test_a_value_outside_its_range_is_refused_by_its_flag(
    kind: type[FlagSection], name: str, rule: Range | OneOf
) -> None:
    is_list = isinstance(kind.flag_fields()[name], list)
    for value in refused(rule):
        with pytest.raises(ValueError, match=f"^{flag_name(name)} must be ") as raised:
            kind(**{name: [value] if is_list else value})
        assert str(rule) in str(raised.value) and repr(value) in str(raised.value)
    for value in accepted(rule):
        assert value in rule


def test_every_number_has_a_range() -> None:
    """--rasft-query-groups has no such range: its value is compared with the model's config.json."""
    numbers = {
        name
        for kind in SECTIONS.values()
        for name, annotated in kind.types().items()
        if any(part in (int, float) for part in (annotated, *getattr(annotated, "__args__", ())))
    }
    assert numbers - {name for _, name, _ in RULES} == {"rasft_query_groups"}


@pytest.mark.parametrize(
    ("rule", "text", "inside", "outside"),
    [
        (Range(at_least=1), ">= 1", [1, 1e9, math.inf], [0.5, -1, math.nan]),
        (Range(above=0), "> 0", [1e-9, math.inf], [0, math.nan]),
        (Range(at_most=3), "<= 3", [3, -math.inf], [3.5, math.nan]),
        (Range(above=1, below=math.inf), "> 1 and finite", [1.5], [1, math.inf, math.nan]),
        (Range(below=math.inf), "finite", [-5], [math.inf]),
        (Range(at_least=0, at_most=1), "in [0, 1]", [0, 0.5, 1], [-0.1, 1.1, math.nan]),
        (Range(above=0, below=1), "in (0, 1)", [0.5], [0, 1]),
        (OneOf(("a", "b", "c")), "a, b or c", ["a", "c"], ["d", ""]),
        (OneOf((0, 1)), "0 or 1", [0, 1], [2]),
    ],
)
def test_a_rule_reads_as_it_checks(rule: Any, text: str, inside: list[Any], outside: list[Any]) -> None:
    assert str(rule) == text
    assert all(value in rule for value in inside)
    assert not any(value in rule for value in outside)


def test_help_shows_range_and_default() -> None:
    text = " ".join(add_arguments(ArgumentParser()).format_help().split())
    assert "Largest ratio. Range: > 0. Default: 1.2" in text
    assert "Range: (0, 1]. Default: 1.0" in text
    assert "(the DFT factor). Default: on" in text
    assert "dft: Dynamic fine-tuning on the demonstrations (arXiv 2508.05629)." in text


# rules between flags


@pytest.mark.parametrize(
    ("kind", "fields", "flags"),
    [
        (RolloutConfig, {"rollout_engine": "replay"}, ["--rollout-engine", "--rollout-replay"]),
        (RolloutConfig, {"rollout_replay": ["rollouts.jsonl"]}, ["--rollout-replay", "--rollout-engine"]),
        (RolloutConfig, {"rollout_engine": "sglang"}, ["--rollout-engine", "--rollout-urls"]),
        (RolloutConfig, {"rollout_lag": 1}, ["--rollout-lag", "--rollout-engine"]),
        (RolloutConfig, {"rollout_urls": ["localhost"]}, ["--rollout-urls"]),
        (
            RolloutConfig,
            {"rollout_guided_samples": 1, "rollout_num_samples": 2},
            ["--rollout-guided-samples", "--rollout-num-samples"],
        ),
        (SyncConfig, {"sync_method": "disk"}, ["--sync-method", "--sync-disk-folder"]),
        (HeldoutConfig, {"heldout_num_samples": 4}, ["--heldout-num-samples", "--heldout-temperature"]),
        (HeldoutConfig, {"heldout_data": ["rows.csv"]}, ["--heldout-data"]),
        (HeldoutConfig, {"heldout_data": ["rows.jsonl", "rows.jsonl"]}, ["--heldout-data"]),
        (DataConfig, {"train_data": ["rows.csv"]}, ["--train-data"]),
        (DataConfig, {"train_data": ["a.jsonl", "b.jsonl", "a.jsonl"]}, ["--train-data", "--data-epochs"]),
        (DataConfig, {"data_id_field": ""}, ["--data-id-field"]),
        (DataConfig, {"data_tests_field": ""}, ["--data-tests-field"]),
        (DataConfig, {"data_response_field": "problem"}, ["--data-response-field"]),
        (DataConfig, {"data_response_field": "answer"}, ["--data-response-field"]),
        (DataConfig, {"data_chat_template": "missing.jinja"}, ["--data-chat-template"]),
        (
            CurriculumConfig,
            {"curriculum_low_start": 0.05},
            ["--curriculum-easy-floor", "--curriculum-low-start"],
        ),
        (CurriculumConfig, {"curriculum_low_end": 0.8}, ["--curriculum-low-end", "--curriculum-high-end"]),
        (CurriculumConfig, {"curriculum_high_end": 0.95}, ["--curriculum-high-end", "--curriculum-ceiling"]),
        (EvaluationConfig, {"temperature": 0.0}, ["--num-samples", "--temperature"]),
        (EvaluationConfig, {"benchmarks": []}, ["--benchmarks"]),
        (EvaluationConfig, {"pass_k": [1, 32]}, ["--pass-k", "--num-samples"]),
        (CapacityConfig, {"rollout_gpus": 8}, ["--rollout-gpus", "--num-gpus"]),
        (CapacityConfig, {"rollout_gpus": 0, "rollout_lag": 1}, ["--rollout-lag", "--rollout-gpus"]),
        (CapacityConfig, {"max_new_tokens": 8192}, ["--max-new-tokens", "--seq-length"]),
    ],
)
def test_a_broken_rule_between_flags_names_them(
    kind: type[FlagSection], fields: dict[str, Any], flags: list[str]
) -> None:
    with pytest.raises(ValueError, match=f"^{flags[0]}") as raised:
        kind(**fields)
    assert all(flag in str(raised.value) for flag in flags)


@pytest.mark.parametrize("objective", ["raft", "grpo", "sdft"])
def test_objectives_on_rollouts_need_rollouts(objective: str) -> None:
    with pytest.raises(ValueError, match="--curriculum-mode"):
        RasftConfig.from_args(parse("--objective", objective, "--curriculum-mode", "off"))


@pytest.mark.parametrize("other", [["--objective", "grpo"], ["--rasft-weighting", "published"]])
@pytest.mark.parametrize(
    "given",
    [
        ["--weighting-wrong-total", "4"],
        ["--weighting-rollout-fall", "0.5"],
        ["--weighting-guidance-solved", "1"],
        ["--weighting-placebo"],
        ["--no-weighting-lr-by-mass"],
        ["--rollout-guided-samples", "1"],
    ],
)
def test_flags_of_the_adaptive_rule_are_refused_without_it(given: list[str], other: list[str]) -> None:
    RasftConfig.from_args(parse(*given))
    RasftConfig.from_args(parse(*other))
    with pytest.raises(ValueError, match=f"^{given[0]} ") as raised:
        RasftConfig.from_args(parse(*given, *other))
    assert " ".join(other) in str(raised.value)


def test_wrong_rollouts_need_the_dft_factor() -> None:
    RasftConfig.from_args(parse("--no-objective-dft-factor"))
    with pytest.raises(ValueError, match=r"^--weighting-wrong-total 2") as raised:
        RasftConfig.from_args(parse("--no-objective-dft-factor", "--weighting-wrong-total", "2"))
    assert "--no-objective-dft-factor" in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], 1),
        (["--rollout-num-samples", "3"], 1),
        (["--rollout-num-samples", "2"], 0),
        (["--rollout-guided-samples", "2"], 2),
        (["--rollout-guided-samples", "0"], 0),
        (["--weighting-rollout-total", "0"], 0),
        (["--rasft-weighting", "published"], 0),
        (["--objective", "grpo"], 0),
    ],
)
def test_one_rollout_is_guided_where_it_can_decide_something(flags: list[str], expected: int) -> None:
    config = RasftConfig.from_args(parse(*flags))
    assert config.num_guided_samples == expected
    own = sampling_params(config, frozenset(), 64).num_samples
    assert own + expected == config.rollout.rollout_num_samples


def test_guided_rollouts_need_own_solutions_to_choose() -> None:
    with pytest.raises(ValueError, match=r"^--rollout-guided-samples 1") as raised:
        RasftConfig.from_args(parse("--rollout-guided-samples", "1", "--weighting-rollout-total", "0"))
    assert "--weighting-rollout-total" in str(raised.value)


# reading back


def test_flags_read_back_from_arguments() -> None:
    config = RasftConfig.from_args(parse("--rollout-num-samples", "7", "--objective-ratio", "off"))
    assert config.rollout.rollout_num_samples == 7
    assert config.objective.name == "rasft" and not config.objective.needs_reference_logprobs()
    assert config.samples_rollouts
    assert not RasftConfig.from_args(parse("--objective", "sft")).samples_rollouts
    assert RasftConfig.from_args(parse("--objective", "sft", "--heldout-data", "a.jsonl")).verifies


def test_without_flags_every_section_has_its_defaults() -> None:
    assert RasftConfig.from_args(parse()) == RasftConfig()


@pytest.mark.parametrize("template", ["{problem}", "{demonstration}", "{problem}{problem}{demonstration}"])
def test_a_teachers_template_needs_problem_and_demonstration(template: str) -> None:
    with pytest.raises(ValueError, match=r"--objective-sdft-template.*\{(problem|demonstration)\}"):
        RasftConfig.from_args(parse("--objective-sdft-template", template))


def test_sdft_refuses_greedy_rollouts_and_grades_nothing_but_held_out_problems() -> None:
    with pytest.raises(ValueError, match=r"--rollout-temperature.*--objective sdft"):
        RasftConfig.from_args(parse("--objective", "sdft", "--rollout-temperature", "0"))
    config = RasftConfig.from_args(parse("--objective", "sdft"))
    assert config.samples_rollouts and not config.grades_rollouts and not config.verifies
    measured = RasftConfig.from_args(parse("--objective", "sdft", "--heldout-data", "rows.jsonl"))
    assert measured.verifies and not measured.grades_rollouts


def test_flags_of_an_objective_that_is_not_used_are_checked_too() -> None:
    with pytest.raises(ValueError, match="--objective-gft-threshold"):
        RasftConfig.from_args(parse("--objective", "sft", "--objective-gft-threshold", "2"))


@pytest.mark.parametrize(
    ("flags", "skips"),
    [
        ([], False),
        (["--objective-grpo-dapo"], True),
        (["--objective-grpo-dapo", "--no-weighting-skip-degenerate"], False),
        (["--weighting-skip-degenerate"], True),
    ],
)
def test_dapo_skips_degenerate_groups_unless_a_flag_differs(flags: list[str], skips: bool) -> None:
    objective = RasftConfig.from_args(parse("--objective", "grpo", *flags)).objective
    assert isinstance(objective, Grpo) and objective.skips_degenerate_groups is skips


# documentation


@pytest.mark.parametrize("kind", SECTIONS.values(), ids=SECTIONS)
def test_every_flag_is_documented(kind: type[FlagSection]) -> None:
    assert kind.docs().keys() == kind.flag_fields().keys()
    assert all(text.endswith((".", '."', ").")) for text in kind.docs().values())


def test_no_flag_has_two_sections() -> None:
    names = [name for kind in RasftConfig.sections().values() for name in kind.flag_fields()]
    assert len(names) == len(set(names))


def test_flags_named_in_help_and_messages_exist() -> None:
    known = set(
        add_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))._option_string_actions
    )
    for kind in (EvaluationConfig, CapacityConfig, AssumptionConfig):
        parser = ArgumentParser()
        add_flags(parser, kind)
        known |= set(parser._option_string_actions)
    # these are flags of SGLang, torchrun and nsys
    known |= {"--server", "--api-key", "--answers-from-responses"}
    known |= {"--checkpoint", "--dtype", "--model", "--output"}
    known |= {"--admin-api-key", "--nproc-per-node", "--cuda-memory-usage"}
    package = Path(__file__).resolve().parents[3] / "megatron_rasft"
    files = [
        *(package / "config").glob("*.py"),
        *(package / "objective").rglob("*.py"),
        *(package / "tools").glob("*/config.py"),
    ]
    assert len(files) > 15
    for file in files:
        named = set(
            re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9](?![\w*-])", file.read_text(encoding="utf-8"))
        )
        assert named <= known, f"{file} names flags that do not exist: {sorted(named - known)}"
