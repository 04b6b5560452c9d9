"""Joins the other packages to Megatron. No other package that a run uses imports megatron.training."""

import warnings

from megatron_rasft.training import wgrad

# Megatron warns at import about every optional kernel library that is missing. A run reports the kernels that it uses instead.
warnings.filterwarnings("ignore", module=r"megatron\..*")

# Must come before the import of Megatron's layers, which look for this module once.
wgrad.register()
