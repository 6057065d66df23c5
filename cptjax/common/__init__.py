"""Console, files, run log, trackers, processes, images and command-line flags; knows nothing of models or tasks."""
