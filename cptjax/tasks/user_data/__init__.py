"""Tasks from a user's own files: readers, columns, rows."""
