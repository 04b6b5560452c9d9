"""Imported by the process from which ranks on the emulated machine are forked. sitecustomize.py has already emulated the GPUs."""

import tests.preloaded  # noqa: F401
