"""Carries new weights to the rollout servers, in bounded buckets, and proves that they arrived."""

from megatron_rasft.sync.push import WeightSync
from megatron_rasft.sync.report import SyncReport

__all__ = ["SyncReport", "WeightSync"]
