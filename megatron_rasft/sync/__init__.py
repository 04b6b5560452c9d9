"""Sends new weights to the rollout servers in buckets of bounded size, and proves that the servers have them.

``push.WeightSync`` runs a sync on all ranks. ``session`` is rank 0's part, ``transfer`` the part of the sending ranks.
"""

from megatron_rasft.sync.push import WeightSync
from megatron_rasft.sync.report import SyncReport

__all__ = ["SyncReport", "WeightSync"]
