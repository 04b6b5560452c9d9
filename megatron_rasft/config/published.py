"""The flags that ``--rasft-weighting published`` sets: the sampling, the text filters and the de-duplication of the script."""

from argparse import Namespace
from collections.abc import Container
from typing import Any

from megatron_rasft.config.rollout import RolloutConfig
from megatron_rasft.config.verify import VerifyConfig, published_filters
from megatron_rasft.flags import flag_name


def wants_preset(args: Namespace) -> bool:
    """Returns whether parsed flags ask for the preset."""
    return args.objective == "rasft" and args.rasft_weighting == "published"


def published_preset() -> dict[str, Any]:
    """Field -> value, for the fields of ``RolloutConfig`` and ``VerifyConfig`` that the preset sets."""
    sampling = {
        "rollout_num_samples": 3,
        "rollout_temperature": 0.9,
        "rollout_top_p": 0.95,
        "rollout_repetition_penalty": 1.1,
    }
    return sampling | published_filters()


def describe_preset(given: Container[str]) -> str:
    """Returns a console line with the values that the preset has changed.

    Args:
        given: the fields whose flags are on the command line; the preset does not change these.
    """
    defaults = RolloutConfig.flag_fields() | VerifyConfig.flag_fields()
    changed = [
        _as_flag(name, value)
        for name, value in published_preset().items()
        if name not in given and value != defaults[name]
    ]
    return f"--rasft-weighting published sets {' '.join(changed) or 'nothing: every flag is given'}"


def _as_flag(name: str, value: Any) -> str:
    return flag_name(name) if value is True else f"{flag_name(name)} {value}"
