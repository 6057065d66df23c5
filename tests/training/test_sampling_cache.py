"""A killed run samples only the missing parts, and nothing is reused under other settings."""

import dataclasses

import jax
import numpy as np
import pytest
import run_helpers
from device_fixtures import one_device  # noqa: F401

from cptjax import sharding
from cptjax.common import files, signals
from cptjax.common.signals import SamplingStopped
from cptjax.config import resolve_stages
from cptjax.continual import driver
from cptjax.data.cost import WorkCost
from cptjax.generation import generate
from cptjax.training import sampling_cache, self_training
from cptjax.training.sampling_cache import SamplingCache

pytestmark = pytest.mark.usefixtures("one_device")

SELF = {
    "model": run_helpers.TEXT,
    "stages": ({"task": "facts", "steps": 4},),
    "eval": {"before": False, "limit": 2},
    "checkpoint": {"every": 0},
    "data": {"limit": 8, "prompt_limit": 64, "buckets": (64,)},
}


def cache(path, stopping=bool, **sections):
    stage = resolve_stages(run_helpers.config("iterative", **sections))[0]
    return SamplingCache(path, stage, sharding.make_mesh(devices=jax.devices()[:1]), stopping)


def take_parts(kept: SamplingCache, upto: int, log: list) -> list:
    """Take parts 0, 1, ...; `log` gets those that are sampled."""
    sample_part = lambda i: (
        lambda: (log.append(i), ([[i, f"é{i}\n"]], WorkCost(i, 1, 0.1 * i, 2)))[1]
    )
    return [kept.next_part(sample_part(i)) for i in range(upto)]


def test_only_missing_parts_are_sampled(tmp_path):
    whole = take_parts(cache(tmp_path / "whole.jsonl"), 5, [])
    log: list = []
    take_parts(cache(tmp_path / "a.jsonl"), 3, log)
    file = tmp_path / ".a.jsonl.partial0"
    file.write_bytes(file.read_bytes()[:-4])  # killed while it wrote the third
    again = cache(tmp_path / "a.jsonl")
    assert take_parts(again, 5, log) == whole and log == [0, 1, 2, 2, 3, 4]
    again.discard()
    assert not file.exists()


def test_stopping_keeps_the_parts_and_other_settings_do_not(tmp_path):
    log: list = []
    with pytest.raises(SamplingStopped):
        take_parts(cache(tmp_path / "a.jsonl", stopping=lambda: len(log) == 2), 5, log)
    assert log == [0, 1]
    take_parts(cache(tmp_path / "a.jsonl", eval={"limit": 3}), 2, log)
    assert log == [0, 1]  # evaluation settings do not matter
    take_parts(cache(tmp_path / "a.jsonl", rollout={"temperature": 0.5}), 2, log)
    assert log == [0, 1, 0, 1]


def test_a_file_of_other_settings_is_removed(tmp_path):
    path = tmp_path / "a.jsonl"
    assert not cache(path).is_complete()
    sampling_cache.write_samples(path, "", WorkCost(), cache(path).fingerprint)
    assert cache(path).is_complete() and cache(path, eval={"limit": 3}).is_complete()
    assert not cache(path, train={"lr": 0.5}).is_complete() and not path.exists()


def test_samples_that_were_changed_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    sampling_cache.write_samples(path, "{}\n", WorkCost(seen=8), cache(path).fingerprint)
    cost = path.with_suffix(".cost.json")
    path.write_text("[]\n")
    with pytest.raises(ValueError, match="a.jsonl was changed since it was written; restore it"):
        cache(path).is_complete()
    path.write_text("{}\n")
    cost.write_text(cost.read_text().replace("8", "9", 1))
    with pytest.raises(ValueError, match="a.cost.json: its values differ from their sha256"):
        cache(path).is_complete()


@pytest.mark.parametrize("stop", ["killed", "sigterm"])
def test_a_run_that_ends_while_it_samples_resumes_there(tmp_path, monkeypatch, stop):
    """SIGTERM between two parts of the second window saves the step before.

    A kill resumes from the first.
    """
    c, calls, sample = run_helpers.config("iterative", **SELF), [], generate.sample_responses

    def counted(*args, **more):
        calls.append(args)
        if len(calls) == 4 and stop == "killed":
            raise KeyboardInterrupt
        out = sample(*args, **more)
        return dataclasses.replace(out, finished=np.ones_like(out.finished))

    monkeypatch.setattr(generate, "sample_responses", counted)
    monkeypatch.setattr(self_training, "is_correct", lambda parts: True)
    with (
        monkeypatch.context() as patched,
        pytest.raises(KeyboardInterrupt if stop == "killed" else signals.Preempted),
    ):
        if stop == "sigterm":
            patched.setattr(signals.StopSignals, "agreed", lambda self: len(calls) == 3)
        driver.run(c, tmp_path / "run")
    assert (
        len(files.read_jsonl(tmp_path / "run" / "corpus" / ".stage1_step2.jsonl.partial0")) == 2
    )  # its header, and a part
    saved = [
        p.name for p in (tmp_path / "run" / "checkpoints" / "steps").iterdir() if p.name.isdigit()
    ]
    assert saved == ([str(10**6 + 2)] if stop == "sigterm" else [])
    driver.run(c, tmp_path / "run")
    driver.run(c, tmp_path / "whole")
    run_helpers.assert_same(
        run_helpers.run_state(tmp_path / "whole"), run_helpers.run_state(tmp_path / "run")
    )
    assert not list((tmp_path / "run" / "corpus").glob(".*"))
