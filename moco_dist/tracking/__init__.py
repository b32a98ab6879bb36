"""Metrics during a run: metrics.jsonl, the terminal, W&B, TensorBoard."""
