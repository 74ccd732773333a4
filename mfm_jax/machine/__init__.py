"""What the machine gives a run: memory, caches, devices and processes, signals, versions of software."""
