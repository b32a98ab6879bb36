"""The life and the files of a run: from arguments to exit status, checkpoints, the lock."""
