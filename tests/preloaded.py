"""Imports everything that ranks need. The process that ranks are forked from imports this module once for all of them."""

import gc
import os

# Makes Triton interpret this project's kernels on the CPU. Triton reads it when a kernel is defined and when it runs.
os.environ["TRITON_INTERPRET"] = "1"

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

import megatron_rasft.verify.mathematics.answer_grading
import megatron_rasft.verify.programs.program_grading  # noqa: F401
import pretrain_rasft  # noqa: F401
import tests.functional.launching
import tests.tiny_models
import tests.tiny_policy  # noqa: F401
from tests import kept_sources

kept_sources.keep()
kept_sources.read_all()

gc.collect()
gc.freeze()  # garbage collection in the ranks then skips these objects and leaves their memory shared
