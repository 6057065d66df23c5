"""One training step, the training loop, and where its batches come from."""
