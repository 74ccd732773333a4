"""A run's folder: its files by name, its lock, its checkpoints."""
