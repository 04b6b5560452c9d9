"""Joins the other packages to Megatron. No other package that a run uses imports megatron.training."""

import megatron_rasft.machine  # noqa: F401 # must come before the first import of Megatron
