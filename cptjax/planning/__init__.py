"""Check a config, and compile the programs of a run ahead of time for hardware that need not exist."""
