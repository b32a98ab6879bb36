"""Communication between processes: collectives, heartbeats, requests to stop."""
