"""Rollouts on the training mesh: sampler, decode pool, token sampling, rollout weights."""
