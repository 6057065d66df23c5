"""Two distributions of lengths of responses, of GRPO runs that papers describe."""

import numpy as np

# Tokens of a prompt, responses to it, their mean and longest length.
DISTRIBUTIONS = {
    "mean 246 of 1,024": (1400, 8, 246, 1024),
    "mean 348 of 2,048": (600, 5, 348, 2048),
}


def lengths_of(mean: float, limit: int, shape: tuple, seed: int = 0) -> np.ndarray:
    """Return lognormal lengths, cut at a limit, with this mean."""
    noise = np.exp(np.random.default_rng(seed).standard_normal(shape))
    scales = np.linspace(1, mean, 2000)
    means = [np.minimum(scale * noise, limit).mean() for scale in scales]
    scale = scales[np.argmin(np.abs(np.array(means) - mean))]
    return np.maximum(np.minimum(scale * noise, limit).astype(int), 1)
