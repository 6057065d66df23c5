"""Losses, advantages, filters, weight penalties, distillation, optimizers: arrays in and out."""
