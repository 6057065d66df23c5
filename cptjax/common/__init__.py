"""Console, files, run log, trackers, processes, images, flags; independent of models and tasks."""
