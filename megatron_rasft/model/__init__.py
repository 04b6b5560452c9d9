"""Builds Megatron's model and its layers, and checks that the model fits the parallel layout."""

import megatron_rasft.machine  # noqa: F401 # must come before the first import of Megatron
