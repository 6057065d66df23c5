"""Losses, advantages, filters, weight penalties, distillation and optimizers: arrays in, arrays out."""
