"""What the process that ranks are forked from imports: all that a rank would otherwise import for itself."""

import gc
import os

# Read when Triton defines a kernel and when it runs one: on a CPU the ranks interpret this project's.
os.environ["TRITON_INTERPRET"] = "1"

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

import pretrain_rasft  # noqa: F401
import tests.functional.launching
import tests.tiny_models
import tests.tiny_policy  # noqa: F401

gc.collect()
gc.freeze()  # what is here stays: a collection in a rank need not look at it
