"""Builds the Megatron model, in the layers of the machine, and computes what Megatron's layers lack."""

import megatron_rasft.machine  # noqa: F401 # must come before the first import of Megatron
