"""Where a run can be watched: Weights & Biases, TensorBoard, pictures."""
