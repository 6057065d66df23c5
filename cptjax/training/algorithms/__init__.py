"""Losses, advantages, filters, regularizers, distillation and optimizers: arrays in, arrays out."""
