"""Console lines about choices of the method that a user should know of, printed when a run begins."""

from collections.abc import Container

from megatron_rasft.config import RasftConfig
from megatron_rasft.config.published import describe_preset
from megatron_rasft.flags import flag_name


def remarks(config: RasftConfig, given: Container[str], num_programs: int) -> list[str]:
    """Returns the remarks on this run.

    Args:
        given: the fields whose flags are on the command line.
        num_programs: number of problems whose responses are programs.
    """
    lines = config.objective.remarks() + _distillation_remarks(config) + _function_remarks(config, given)
    if config.objective.name == "rasft" and config.weighting.rasft_weighting == "published":
        lines.append(describe_preset(given))
        if config.samples_rollouts:
            lines += _published_remarks(config, num_programs)
    return lines


def _distillation_remarks(config: RasftConfig) -> list[str]:
    if config.objective.teacher() is None:
        return []
    names = ("rollout_temperature", "rollout_top_p", "rollout_repetition_penalty")
    values = {name: getattr(config.rollout, name) for name in names}
    changed = [f"{flag_name(name)} {value:g}" for name, value in values.items() if value != 1]
    if not changed:
        return []
    return [
        f"warning: with {', '.join(changed)} the rollouts are not samples of the policy itself, so the gradient of "
        f"--objective {config.objective.name} is not that of its KL to the teacher. Give 1 for each, which is the default."
    ]


def _function_remarks(config: RasftConfig, given: Container[str]) -> list[str]:
    if config.verify.verify_function is None:
        return []
    if not config.verifies:
        return ["--verify-function has no effect: this run grades nothing"]
    if "data_prompt_suffix" in given:
        return []
    return [
        "warning: --verify-function grades the responses, but every prompt asks for the answer in \\boxed{}, which is the default of "
        '--data-prompt-suffix. Give --data-prompt-suffix with your own instruction, or with "".'
    ]


def _published_remarks(config: RasftConfig, num_programs: int) -> list[str]:
    lines = []
    if config.curriculum.curriculum_mode != "band":
        lines.append(
            f"the published script samples a band of difficulties (--curriculum-mode band), this run uses "
            f"--curriculum-mode {config.curriculum.curriculum_mode}"
        )
    verify = config.verify
    if num_programs and verify.verify_filter_programs and verify.verify_filter_format:
        lines.append(
            f"warning: the format filter drops every program, because programs have no \\boxed{{}}. The {num_programs} problems "
            "with tests train on their demonstrations only. To keep their rollouts omit --verify-filter-programs or give "
            "--no-verify-filter-format."
        )
    elif num_programs:
        lines.append(
            f"warning: the published filters would drop every program, because programs have no \\boxed{{}}. The {num_programs} "
            "problems with tests are therefore not filtered. To filter them as the script does give --verify-filter-programs."
        )
    return lines
