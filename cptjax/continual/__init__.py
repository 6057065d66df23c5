"""Run every stage of a config: train, save, evaluate, record, resume."""
