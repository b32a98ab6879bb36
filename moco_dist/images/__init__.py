"""Images: in memory, or streamed from files and tars by processes that decode."""
