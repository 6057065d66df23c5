"""Tasks whose images and questions are generated from a seed, without any download."""
