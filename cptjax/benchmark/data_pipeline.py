"""The data phase: measure rows per second of the pipeline, from examples to padded batches."""

import dataclasses
import functools
import io
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from cptjax.data import processor
from cptjax.data.collate import collate_rows
from cptjax.data.loader import BatchStream
from cptjax.data.mixture import Mixture
from cptjax.models.families import PRESETS
from cptjax.tasks.synthetic import dataset
from cptjax.types import Example


def measure_data_pipeline(
    rows: int = 20_000, jpegs: int = 160, workers: int = 0
) -> dict[str, float]:
    """Return the rows per second of the pipeline, and those per core, with and without JPEGs."""
    tiny = PRESETS["tiny"]
    large = dataclasses.replace(tiny, vision=PRESETS["3b"].vision)
    examples = dataset.make_synthetic_task("bench", "colour", side=64).load("train", limit=rows)
    words = [
        processor.load_processor(None, cfg, side * side, side * side)
        for cfg, side in ((tiny, 64), (large, 448))
    ]
    collate = functools.partial(collate_rows, buckets=(64, 512))
    count, wall, cpu = time_epoch(examples, functools.partial(_encode, words[0]), collate, workers)
    photos, _, jpeg = time_epoch(_photos(jpegs), functools.partial(_encode, words[1]), collate, 0)
    return {
        "data_rows": count,
        "data_rows_s": count / wall,
        "data_rows_s_core": count / cpu,
        "data_jpeg_448_rows": photos,
        "data_jpeg_448_rows_s_core": photos / jpeg,
    }


def time_epoch(
    examples: Sequence[Example],
    prepare: Callable[[Example, int], Any],
    collate: Callable,
    workers: int,
) -> tuple[int, float, float]:
    """Return (rows, seconds, CPU seconds) of one epoch without its first batch."""
    batch = min(32, len(examples) // 2)
    steps = len(examples) // batch - 1
    with BatchStream(
        Mixture((len(examples),), batch),
        [examples],
        prepare,
        collate=collate,
        workers=workers,
        prefetch=1,
    ) as stream:
        next(stream)  # after the first batch all workers have started
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            next(stream)
        return steps * batch, time.perf_counter() - wall, time.process_time() - cpu


def _encode(words: Any, example: Example, index: int) -> Any:
    return words.encode(example.messages)


def _photos(n: int) -> list[Example]:
    """Return prompts with 448 x 448 JPEGs of smooth shapes and noise, as costly as photos."""
    rng = np.random.default_rng(0)
    out = []
    for i in range(n):
        soft = Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)).resize(
            (448, 448), Image.Resampling.BICUBIC
        )
        noise = rng.integers(-12, 13, (448, 448, 3))
        file = io.BytesIO()
        Image.fromarray((np.asarray(soft) + noise).clip(0, 255).astype(np.uint8)).save(
            file, "JPEG", quality=90
        )
        content = [
            {"type": "image", "image": file.getvalue()},
            {"type": "text", "text": "which colour is it ?"},
        ]
        out.append(Example(str(i), [{"role": "user", "content": content}], ""))
    return out
