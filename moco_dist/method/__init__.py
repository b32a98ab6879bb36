"""The method of the paper: encoders, queue, loss, views. It knows no file and no run."""
