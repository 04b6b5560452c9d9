"""Samples responses from the trainer's own weights: batches of requests, KV cache, CUDA graphs."""

import megatron_rasft.machine  # noqa: F401 # must come before the first import of Megatron
