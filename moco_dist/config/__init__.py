"""Every key of a configuration, its default and its rule; YAML and key=value."""
