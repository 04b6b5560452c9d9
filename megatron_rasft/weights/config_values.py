"""Reads typed values of a config.json, and refuses values of another type or range."""

import sys
from typing import Any

from megatron_rasft.errors import ModelFolderError

BRIDGE = "--model-source bridge trains it if NVIDIA's Megatron-Bridge supports it"
"""The way out of a refusal."""

_LARGEST_SIZE = 2**31 - 1


def refusal(key: str, wanted: str, found: Any) -> ModelFolderError:
    return ModelFolderError(f"config.json must have {wanted} {key}, found {short(found)}")


def unsupported(feature: str) -> ModelFolderError:
    """The refusal of a model for a feature that the tables, or Megatron's GPTModel, do not have."""
    return ModelFolderError(f"{feature}; {BRIDGE}")


def short(value: Any) -> str:
    return repr(value)[:80]


def positive_int(config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value <= _LARGEST_SIZE:
        raise refusal(key, "a positive integer", value)
    return value


def count(config: dict[str, Any], key: str, default: int) -> int:
    """Returns a number of things, which may be 0."""
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 <= value <= _LARGEST_SIZE:
        raise refusal(key, "an integer of at least 0 as", value)
    return value


def positive_number(config: dict[str, Any], key: str, default: float) -> float:
    """Returns a number. JSON of Python also has NaN and Infinity, which are refused."""
    value = config.get(key)
    value = default if value is None else value
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise refusal(key, "a positive number as", value)
    return float(value)


def flag(config: dict[str, Any], key: str, default: bool = False) -> bool:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise refusal(key, "true or false as", value)
    return value


def list_of(config: dict[str, Any], key: str, kind: type) -> list[Any]:
    """Returns a list, empty if the key is missing or null."""
    value = config.get(key)
    value = [] if value is None else value
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise refusal(key, f"a list of {'names' if kind is str else 'integers'} as", value)
    return value
