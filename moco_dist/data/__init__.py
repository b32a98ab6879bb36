"""Which images there are, and the views of each step."""
