"""Evaluate a task, the KL divergence to the base model, the accuracy matrix, summary and report."""
