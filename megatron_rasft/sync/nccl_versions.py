"""Which torch, and so which NCCL, comes with a version of SGLang: NCCL only connects processes with the same NCCL version.

A server does not report its NCCL. SGLang pins its torch, and torch pins its NCCL, so the version of SGLang implies the NCCL of a
server, unless another NCCL was installed by hand.
"""

import re
from typing import NamedTuple

import torch


class Pair(NamedTuple):
    """The versions of torch and NCCL on one side of a sync."""

    torch: str
    """Major and minor version."""
    nccl: str


_FIRST_WITH: tuple[tuple[tuple[int, ...], str], ...] = (
    ((0, 5, 11), "2.11"),
    ((0, 5, 18), "2.13"),
    ((0, 5, 22), "2.14"),
)
"""First version of SGLang -> the torch that this and later versions pin (Requires-Dist of their wheels)."""

NEWEST_SGLANG = (0, 5, 23)
"""The last version of SGLang for which the table has been checked."""

_NCCL = {"2.11": "2.28.9", "2.12": "2.29.7", "2.13": "2.29.7", "2.14": "2.30.7"}
"""torch of PyPI -> the NCCL that it pins."""


def pair_of_sglang(version: str) -> Pair | None:
    """Returns the versions that pip installs with a version of SGLang; None if the table does not have it."""
    numbers = _numbers(version)
    if not numbers or not _FIRST_WITH[0][0] <= numbers <= NEWEST_SGLANG:
        return None
    wanted = [name for first, name in _FIRST_WITH if first <= numbers][-1]
    return Pair(wanted, _NCCL[wanted])


def own_pair() -> Pair:
    """Returns this process's torch and the NCCL that it has loaded."""
    return Pair(_short(torch.__version__), ".".join(map(str, torch.cuda.nccl.version())))


def objection(sglang: str, own: Pair) -> str:
    """Returns why NCCL cannot connect this process to a server of this SGLang version, and the way out; empty if it can.

    Raises:
        LookupError: the version is not in the table.
    """
    theirs = pair_of_sglang(sglang)
    if theirs is None:
        raise LookupError(
            f"SGLang {sglang} is not in the table of docs/servers.md: check that its torch has NCCL {own.nccl}, like the trainer's"
        )
    if theirs.nccl == own.nccl:
        return ""
    fitting = ", ".join(versions for versions, pair in table() if pair.nccl == own.nccl)
    return (
        f"SGLang {sglang} comes with torch {theirs.torch} and NCCL {theirs.nccl}, the trainer has torch {own.torch} and NCCL "
        f"{own.nccl}, and NCCL connects equal versions only. Install torch {theirs.torch} for the trainer"
        + (f", or SGLang {fitting} for the server" if fitting else "")
    )


def table() -> list[tuple[str, Pair]]:
    """Returns each range of SGLang's versions as text, with the torch and NCCL that it installs."""
    rows = []
    for (first, name), after in zip(_FIRST_WITH, [*_FIRST_WITH[1:], None], strict=True):
        last = NEWEST_SGLANG if after is None else (*after[0][:2], after[0][2] - 1)
        rows.append((f"{_text(first)} to {_text(last)}", Pair(name, _NCCL[name])))
    return rows


def _numbers(version: str) -> tuple[int, ...]:
    """Returns (0, 5, 15) for 0.5.15.post1 and 0.5.15.dev30, () for text that is not a version."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return tuple(map(int, match.groups())) if match else ()


def _short(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
