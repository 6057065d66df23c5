"""Loss against distance: known relations are recovered; distances between weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from cptjax.analysis import drift
from cptjax.common import files, run_log


def write_run(folder, rows):
    """A workdir of one stage per (KL on the new task, KL and loss on the general task)."""
    log = run_log.RunLog(folder)
    about = ("exact", "answer", "1-1", "greedy")

    def cell(stage, task, metric, value):
        values = (stage, f"s{stage}", 1, task, metric, value, 100, 0.01, *about)
        log.evals([dict(zip(run_log.EVAL_COLUMNS, values, strict=True))])

    cell(0, "facts", "accuracy", 0.9)
    for stage, (new, old, loss) in enumerate(rows, 1):
        cell(stage, f"t{stage}", "accuracy", 0.9)
        cell(stage, f"t{stage}", "kl_base", new)
        cell(stage, "facts", "accuracy", 0.9 - loss)
        cell(stage, "facts", "kl_base", old)
    log.close()
    stages = [{"task": f"t{i}", "steps": 1} for i in range(1, len(rows) + 1)]
    config = {
        "name": folder.name,
        "seed": 0,
        "stages": stages,
        "eval": {"tasks": "facts", "general": ["facts"], "groups": {}},
    }
    files.write_json(folder / "config.json", config)


def test_a_planted_law_is_found_over_runs(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("sft", "grpo"):
        new = rng.uniform(0, 1, 5)
        write_run(tmp_path / name, [(x, rng.uniform(), 0.1 * x + 0.4 * x**2) for x in new])
    found = drift.analyze([tmp_path])
    new, old = found.numbers["fits"]
    assert new["measure"] == "KL on the new task" and new["n"] == old["n"] == 10
    assert (
        new["r2"] == pytest.approx(1)
        and new["curve"] == pytest.approx((0.4, 0.1, 0), abs=1e-6)
        and old["r2"] < 0.8
    )
    rows = found.numbers["stages"]
    points = np.array([(r["far"]["KL on the new task"], r["loss"]) for r in rows])
    assert (
        new["pearson"] == pytest.approx(np.corrcoef(points.T)[0, 1])
        and "100 %" in found.sentences[0]
    )


def test_too_few_stages_for_a_fit_are_refused(tmp_path):
    write_run(tmp_path / "one", [(0.1, 0.2, 0.3), (0.2, 0.1, 0.2), (0.3, 0.3, 0.1)])
    with pytest.raises(ValueError, match="3 stages have a loss.*needs at least 4.*eval.drift"):
        drift.analyze([tmp_path / "one"])
    write_run(tmp_path / "flat", [(0.1 * i, 0.2 * i, 0.1) for i in range(4)])
    with pytest.raises(ValueError, match="all 4 stages have the same loss"):
        drift.analyze([tmp_path / "flat"])


def test_distances_of_weights_by_part():
    base = {"text": {"a": jnp.full((3, 4), 2.0), "b": jnp.ones(4)}, "vision": {"c": jnp.ones(5)}}
    now = {
        "text": {"a": base["text"]["a"].at[0].add(0.5), "b": jnp.ones(4) * (1 + 1e-6)},
        "vision": {"c": jnp.ones(5)},
    }
    found = drift.weight_distances(base, now)
    text = drift.distance_metrics(found["text"])
    assert text == pytest.approx(
        {"L2": 1.0, "relative L2": (1 / 52) ** 0.5, "L1": 2.0, "share moved": 4 / 16}, abs=1e-5
    )
    assert drift.distance_metrics(found["vision"], "x ")["x L2"] == 0
