"""Functions for --verify-function: the JSON value at the end of a reply is compared with the row's field "wanted"."""

import json
import re
from typing import Any

from megatron_rasft.reasoning_tags import without_reasoning

_MAX_CHARS = 4_000
_BEGINS_VALUE = re.compile(r'[\[{"\-0-9tfn]')


class NoJsonError(ValueError):
    """A reply does not end with a JSON value."""


def grade(row: dict[str, Any], response: str) -> tuple[bool, str]:
    """Returns whether the value equals the wanted value exactly; 1.0 is not 1, and the order of fields does not count."""
    try:
        found = json_at_end(response)
    except NoJsonError as error:
        return False, str(error)
    return _as_text(found) == _as_text(row["wanted"]), f"found {_as_text(found)}"


def share_of_fields(row: dict[str, Any], response: str) -> tuple[float, str]:
    """Returns the share of fields with the wanted value, among the fields that are wanted or found."""
    try:
        found, wanted = json_at_end(response), row["wanted"]
    except NoJsonError as error:
        return 0.0, str(error)
    if not isinstance(found, dict) or not isinstance(wanted, dict):
        return float(_as_text(found) == _as_text(wanted)), f"found {_as_text(found)}"
    names = found.keys() | wanted.keys()
    equal = [name for name in names if _as_text(found.get(name)) == _as_text(wanted.get(name))]
    return len(equal) / max(1, len(names)), f"{len(equal)} of {len(names)} fields"


def json_at_end(response: str) -> Any:
    """Returns the longest JSON value with which a response ends. Reasoning and a code fence around the value do not count.

    Raises:
        NoJsonError: the response does not end with a JSON value.
    """
    reply = without_reasoning(response).rstrip().removesuffix("```").rstrip()[-_MAX_CHARS:]
    for begin in _BEGINS_VALUE.finditer(reply):
        try:
            return json.loads(reply[begin.start() :])
        except ValueError:
            continue
        except RecursionError:  # thousands of brackets, each of which would be tried
            break
    raise NoJsonError("no JSON value at the end")


def _as_text(value: Any) -> str:
    # Python's == would say that 1, 1.0 and true are equal
    return json.dumps(value, sort_keys=True)
