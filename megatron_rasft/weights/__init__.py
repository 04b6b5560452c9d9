"""Hugging Face folders <-> Megatron models: one table per family, both directions, streamed."""
