"""Fits Megatron to the machine: a backend for CPUs, checks of GPU kernels, and the fused weight gradient without Apex.

``model``, ``generation``, ``checkpoints`` and ``training`` import this package before Megatron.
"""

import warnings

from megatron_rasft.machine import wgrad

# Megatron warns at import about every optional kernel library that is missing. A run reports the kernels that it uses instead.
warnings.filterwarnings("ignore", module=r"megatron\..*")

# Must come before the import of Megatron's layers, which look for this module once.
wgrad.register()
