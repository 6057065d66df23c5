"""Console, files, run log, trackers, processes, images and flags; knows no models or tasks."""
