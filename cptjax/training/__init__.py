"""The training loop, the step that it repeats, and the sources of its batches."""
