"""What processes have to do with each other: collectives, who is alive, when to stop."""
