"""The images, and the views of each step."""
