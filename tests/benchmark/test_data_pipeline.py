"""The benchmark of the data pipeline counts every row that it reads."""

import time

from cptjax.benchmark import data_pipeline
from cptjax.types import Example


def test_benchmark_measures_the_whole_pipeline():
    found = data_pipeline.measure_data_pipeline(rows=64, jpegs=2)
    assert (found["data_rows"], found["data_jpeg_448_rows"]) == (
        32,
        1,
    )  # the first batch starts the workers
    assert (
        min(found["data_rows_s"], found["data_rows_s_core"], found["data_jpeg_448_rows_s_core"]) > 5
    )


def test_the_benchmark_counts_the_rows_that_it_reads():
    rows, wall, _ = data_pipeline.time_epoch(
        [Example(str(i), [], i) for i in range(16)], lambda example, _: time.sleep(0.02), list, 0
    )
    assert rows == 8 and wall > 0.9 * rows * 0.02
