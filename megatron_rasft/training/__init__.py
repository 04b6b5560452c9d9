"""Joins the rooms to Megatron: the only room that imports megatron.training."""

import warnings

from megatron_rasft.training import wgrad

# Megatron warns at import about every optional kernel library that is missing; the run says what it uses.
warnings.filterwarnings("ignore", module=r"megatron\..*")

# Before Megatron's layers are imported: they look for the module once.
wgrad.register()
