"""The driver: runs every stage of a config, saves, evaluates, records, resumes."""
