"""The `data` section of a config as a frozen dataclass."""

import dataclasses
from typing import Any

from cptjax.data.collate import length_buckets


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """`config.data`; the defaults and the units are in configs/base.py."""

    root: str
    outside_images: tuple[str, ...]
    prompt_limit: int
    buckets: tuple[int, ...]
    bad_rows: int
    limit: int | None
    workers: int
    prefetch: int
    pack: bool
    template: str
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.buckets and (min(self.buckets) < 1 or max(self.buckets) != self.prompt_limit):
            raise ValueError(
                "data.buckets: expected token lengths >= 1, the largest of them "
                f"data.prompt_limit={self.prompt_limit}, got {self.buckets}"
            )
        if self.weights and min(self.weights) <= 0:
            raise ValueError(f"data.weights: expected numbers > 0, got {self.weights}")

    @classmethod
    def from_config(cls, section: Any) -> "DataConfig":
        """Read a config's `data` section."""
        values = {field.name: section[field.name] for field in dataclasses.fields(cls)}
        for name in ("outside_images", "buckets", "weights"):
            values[name] = tuple(values[name])
        return cls(**values)

    @property
    def length_buckets(self) -> tuple[int, ...]:
        """The token lengths that rows are padded to."""
        return self.buckets or length_buckets(self.prompt_limit)

    @property
    def longest_row(self) -> int:
        """The tokens of the longest row that the data may hold."""
        return max(self.length_buckets)
