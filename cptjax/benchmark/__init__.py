"""Times the phases of a run, beside transformers and torch."""
