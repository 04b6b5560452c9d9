"""The console lines about choices of the method."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rasft.config import CurriculumConfig, RasftConfig, RolloutConfig, VerifyConfig, WeightingConfig
from megatron_rasft.config.published import describe_preset, published_preset
from megatron_rasft.objective.declaration import Objective
from megatron_rasft.objective.families.importance_weighted import IwSft
from megatron_rasft.objective.families.self_distillation import Sdft
from megatron_rasft.objective.families.token_selective import Profit
from megatron_rasft.training.remarks import remarks


def published(mode: str = "band", **verify: bool) -> RasftConfig:
    filters = {name: value for name, value in published_preset().items() if name.startswith("verify")}
    return RasftConfig(
        weighting=WeightingConfig(rasft_weighting="published"),
        curriculum=CurriculumConfig(curriculum_mode=mode),  # type: ignore[arg-type]
        verify=VerifyConfig(**filters | verify),
    )


def test_the_log_lists_the_values_that_the_preset_has_set() -> None:
    assert describe_preset(()) == (
        "--rasft-weighting published sets --rollout-num-samples 3 --rollout-temperature 0.9 --rollout-top-p 0.95 "
        "--rollout-repetition-penalty 1.1 --verify-dedup-short-texts equal --verify-loop-max-words 0 "
        "--verify-filter-self-correction --verify-filter-symbols --verify-filter-shortcut --verify-filter-format"
    )
    line = describe_preset({"rollout_temperature", "verify_filter_format"})
    assert "--rollout-top-p" in line and "temperature" not in line and "format" not in line
    assert describe_preset(published_preset()).endswith("nothing: every flag is given")
    assert remarks(published(), (), 0) == [describe_preset(())]
    assert remarks(RasftConfig(), (), 3) == []


def test_the_log_names_another_curriculum_than_the_published() -> None:
    assert "--curriculum-mode all" in remarks(published("all"), (), 0)[1]


@pytest.mark.parametrize(
    ("config", "flag"),
    [
        (published(), "give --verify-filter-programs"),
        (published(verify_filter_programs=True), "--no-verify-filter-format"),
    ],
)
def test_programs_and_the_published_filters_are_warned_about(config: RasftConfig, flag: str) -> None:
    (_, warning) = remarks(config, (), 7)
    assert warning.startswith("warning") and "7 problems" in warning and flag in warning


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (IwSft(), "power 2 "),
        (IwSft(objective_iw_power=1.0), "power 1 "),
        (Profit(objective_profit_threshold=0.2), "above 0.2"),
    ],
)
def test_objectives_say_where_their_sources_disagree(objective: Objective, words: str) -> None:
    (line,) = remarks(RasftConfig(objective=objective), (), 0)
    assert words in line


def test_the_log_names_a_prompt_that_asks_for_a_box_which_an_own_function_may_not_read(
    tmp_path: Path,
) -> None:
    file = tmp_path / "own.py"
    file.write_text("")
    config = RasftConfig(verify=VerifyConfig(verify_function=f"{file}:grade"))
    (line,) = remarks(config, (), 0)
    assert "--verify-function" in line and "--data-prompt-suffix" in line
    assert remarks(config, {"data_prompt_suffix"}, 0) == []
    (line,) = remarks(replace(config, curriculum=CurriculumConfig(curriculum_mode="off")), (), 0)
    assert "--verify-function" in line and "suffix" not in line


def test_the_log_says_whose_weights_the_teacher_has_and_that_other_samples_are_not_the_policys() -> None:
    (first,) = remarks(RasftConfig(objective=Sdft()), (), 0)
    (last,) = remarks(RasftConfig(objective=Sdft(objective_sdft_teacher="refresh")), (), 0)
    assert first != last and "--objective-sdft-teacher" in first
    rollout = RolloutConfig(rollout_temperature=0.7, rollout_repetition_penalty=1.1)
    _, warning = remarks(RasftConfig(objective=Sdft(), rollout=rollout), (), 0)
    assert "--rollout-temperature 0.7, --rollout-repetition-penalty 1.1" in warning and "top-p" not in warning
    assert remarks(RasftConfig(rollout=rollout), (), 0) == []
