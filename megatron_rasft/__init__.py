"""Rollout-Adaptive Supervised Fine-Tuning on Megatron-Core."""

__version__ = "0.1.0"
