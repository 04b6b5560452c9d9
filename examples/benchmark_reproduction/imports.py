"""Imports everything that trainings and evaluations need, for ``preloading``. Starts no thread: forked processes would lack it."""

import gc
from importlib import import_module

MODULES = (
    "pretrain_rasft",  # first, because it makes Megatron importable on a machine without a GPU
    "transformers",
    "transformers.models.llama.modeling_llama",
    "tools.evaluate",
    "megatron_rasft.tools.evaluation.embedded_engine",
)

for module in MODULES:
    import_module(module)
gc.collect()
gc.freeze()  # garbage collection in the forked processes then leaves the memory of these objects shared
