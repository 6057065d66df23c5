"""Datasets, a user's own data, prompt templates, rewards and scoring; never imports jax."""
