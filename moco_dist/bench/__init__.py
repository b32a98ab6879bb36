"""`python -m moco_dist.bench`: images per second, and where the time of a step goes."""
