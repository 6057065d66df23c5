"""Rollouts on the training mesh: decode loop, decode pool, token sampling, rollout weights."""
