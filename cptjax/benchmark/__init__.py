"""Benchmarks: time the phases of a run, alone or against transformers and torch."""
