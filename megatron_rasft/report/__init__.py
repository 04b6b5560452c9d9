"""What a run looks like: the console, metrics.jsonl, TensorBoard and Weights & Biases."""
