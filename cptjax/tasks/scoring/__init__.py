"""Scorers, and the worker processes that run user code with time limits."""
