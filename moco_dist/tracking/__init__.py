"""What is read while a run goes on: metrics.jsonl, the terminal, W&B, TensorBoard."""
