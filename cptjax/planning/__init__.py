"""Pre-flight check of a config, and ahead-of-time compilation of all programs of a run."""
