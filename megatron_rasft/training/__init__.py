"""Joins the rooms to Megatron: the only room that imports megatron.training."""

import warnings

# Megatron warns at import about every optional kernel library that is missing; the run says what it uses.
warnings.filterwarnings("ignore", module=r"megatron\..*")
