"""Carries new weights to the rollout servers, in bounded buckets, and proves that they arrived.

What needs torch is imported when it is first asked for: ``estimating`` does without.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_rasft.sync.push import WeightSync
    from megatron_rasft.sync.report import SyncReport

__all__ = ["SyncReport", "WeightSync"]

_HOMES = {"SyncReport": "report", "WeightSync": "push"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
