"""Continual-learning methods: one file each, with its formula, source and defaults."""
