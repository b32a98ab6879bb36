"""The method of the paper: encoders, queue, loss and views; it reads no file and knows no run."""
