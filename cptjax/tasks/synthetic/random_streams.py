"""Random numbers that depend only on (key, example, stream), never on the rest of a batch."""

import dataclasses
import functools

import numpy as np

FloatArray = np.ndarray

HASH_STEP = np.uint64(0x9E3779B97F4A7C15)


def hash_integers(values: np.ndarray) -> np.ndarray:
    """Hash 64-bit integers (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.lru_cache(maxsize=4096)
def hash_key(*parts: int | str) -> np.uint64:
    """Combine numbers and names into one 64-bit key."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        for byte in str(part).encode() + b"/":
            key = hash_integers(key ^ np.uint64(byte + 1)) + HASH_STEP
    return key[0]


@dataclasses.dataclass(frozen=True)
class RandomStreams:
    """The random numbers of n examples, by the name of a stream; each stream is used once."""

    examples: np.ndarray  # [n] hashed (key, index)

    @classmethod
    def of(cls, key: np.uint64, indices: np.ndarray) -> "RandomStreams":
        with np.errstate(over="ignore"):
            return cls(hash_integers(key + (indices.astype(np.uint64) + np.uint64(1)) * HASH_STEP))

    def bits(self, stream: str, size: int = 1) -> np.ndarray:
        """Return [n, size] uniform 64-bit integers."""
        with np.errstate(over="ignore"):
            counters = hash_key(stream) + np.arange(size, dtype=np.uint64) * HASH_STEP
            return hash_integers(self.examples[:, None] ^ hash_integers(counters)[None])

    def uniform(
        self, stream: str, low: float = 0.0, high: float = 1.0, size: int = 1
    ) -> FloatArray:
        """Return [n, size] numbers in [low, high)."""
        return (
            low
            + (high - low)
            * (self.bits(stream, size) >> np.uint64(11)).astype(np.float64)
            * 2.0**-53
        )

    def integer(self, stream: str, high: int) -> np.ndarray:
        """Return [n] integers in [0, high)."""
        return (self.uniform(stream)[:, 0] * high).astype(np.int64)

    def order(self, stream: str, size: int) -> np.ndarray:
        """Return [n, size] random permutations."""
        return np.argsort(self.bits(stream, size), axis=1)
