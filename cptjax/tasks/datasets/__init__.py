"""One built-in dataset per file."""
