"""From examples to device batches: processor, collation, order of the rows, loader, row checks."""
