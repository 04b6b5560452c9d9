"""Models that NVIDIA's Megatron-Bridge builds, loads and converts (``--model-source bridge``), behind the interface of our own tables."""
