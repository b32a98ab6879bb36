"""`python -m moco_dist.probe`: a linear classifier on the frozen encoder, or fine-tuning."""
