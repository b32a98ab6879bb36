"""`python -m moco_dist.doctor`: what would fail, before GPU time is spent."""
