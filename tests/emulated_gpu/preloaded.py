"""Imported by the process that ranks on the emulated machine are forked from. sitecustomize.py has emulated the GPUs before."""

import tests.preloaded  # noqa: F401
