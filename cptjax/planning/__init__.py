"""Checks a config, and compiles the programs of a run ahead of time for hardware that is not here."""
