"""What a run looks like: the console, metrics.jsonl, TensorBoard, Weights & Biases, and the HTML page."""
