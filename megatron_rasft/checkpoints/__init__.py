"""Saves a run's checkpoints, also in the background, finds the one that the run resumes from, and loads it."""

import megatron_rasft.machine  # noqa: F401 # must come before the first import of Megatron
