"""`python -m moco_dist.pretrain`: Momentum Contrast, Algorithm 1 and the loop around it."""
