"""What `moco_dist.report` prints and writes."""
