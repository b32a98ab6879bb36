"""What `moco_dist.export` writes."""
