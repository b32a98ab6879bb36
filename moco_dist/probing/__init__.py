"""What `moco_dist.probe` trains and says of an encoder."""
