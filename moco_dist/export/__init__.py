"""`python -m moco_dist.export`: an encoder under another library's names, with proof."""
