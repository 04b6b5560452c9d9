"""Converts Hugging Face folders to Megatron checkpoints and back, and proves that nothing was lost."""
