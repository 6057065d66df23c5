"""Generated tasks: images and questions that need no download."""
