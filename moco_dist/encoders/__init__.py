"""Trained encoders from anywhere: runs, checkpoints, exports, other libraries."""
