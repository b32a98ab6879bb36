"""`python -m moco_dist.report`: how runs stand, as a table and as one HTML page."""
