"""The analyses of a trained run against its gradients and weights, and command-line mistakes."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest
import run_helpers
from device_fixtures import see

from cptjax.analysis import drift, finding, gradient_risk, influence
from cptjax.analysis.probe import open_probe
from cptjax.continual import driver
from cptjax.evaluation.report import read


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run whose first stage learns responses that end.

    A hash of the response decides which are correct.
    """
    folder = tmp_path_factory.mktemp("analysis")
    (folder / "hash_scorer.py").write_text(
        "import zlib\n\n\ndef score(prediction, answer, **meta):\n    return float(zlib.crc32(prediction.encode()) % 2)\n"
    )

    def task(family):
        return dict(
            task="synthetic", family=family, side=32, scorer=f"{folder / 'hash_scorer.py'}:score"
        )

    tasks = {family: task(family) for family in (*run_helpers.TASKS, "facts")}
    c = run_helpers.config(
        "sft", steps=3, tasks=tasks, eval=dict(general=("facts",), limit=4, batch=4, drift=4)
    )
    c.checkpoint.keep = 3  # more than 2 stay after the stage
    c.stages = (dict(task="colour", steps=20), dict(task="digit", steps=2))
    with pytest.MonkeyPatch.context() as patch:
        see(patch, 1)
        driver.run(c, folder / "run")
        yield folder / "run"


def dot(a, b):
    return sum(
        float(np.vdot(x, y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.slow
def test_influence_is_the_product_of_gradients(workdir):
    with open_probe(workdir, 2, "", "float32") as (probe, names):
        assert names == ["colour", "facts"]
        known = {name: probe.gold_test_responses(name, 2) for name in names}
        u = [
            probe.with_gold_response(item) for item in probe.encode_prompts(probe.training_rows(2))
        ]
        corpus = influence.measure_influence(probe, "gold", u, known, 1e-4, lambda: None)
        slopes = [probe.gradient(encoded) for encoded in u]
        for pull, gradient, encoded in zip(corpus.pulls, slopes, u, strict=True):
            for name, probes in known.items():
                expected = np.mean(
                    [dot(gradient, probe.gradient(v)) / int(v.loss_mask.sum()) for v in probes]
                )
                assert pull.change[name] == pytest.approx(
                    expected, rel=0.03, abs=0.02 * max(map(abs, pull.change.values()))
                )
            assert (
                pull.nats == pytest.approx(-float(probe.token_logprobs([encoded])[0].mean()))
                and pull.kernel > 0
            )
        assert corpus.asymmetry < 0.03
        own = influence.measure_influence(
            probe, "u", u[:1], {"u": u[:1]}, 1e-5, lambda: None
        ).pulls[0]
        assert own.change["u"] * own.tokens == pytest.approx(dot(slopes[0], slopes[0]), rel=0.05)


@pytest.mark.slow
def test_all_corpora_are_compared(workdir, tmp_path):
    rows = [
        json.loads(line)
        for line in (workdir / "predictions" / "stage0.jsonl").read_text().splitlines()
    ]
    assert rows
    with open_probe(workdir, 2, "facts", "float32") as (probe, _):
        items = probe.encode_prompts(probe.training_rows(3))
    lines = [
        {
            "task": "digit",
            "row": i.row,
            "id": i.example.id,
            "response": "7",
            "rewards": {"accuracy": 1.0},
        }
        for i in items
    ]
    path = tmp_path / "other.jsonl"
    path.write_text(
        "".join(
            json.dumps(line) + "\n"
            for line in [*lines, lines[0] | {"rewards": {"accuracy": 0.0}, "id": "?"}]
        )
    )
    found = influence.analyze(str(workdir), 2, 3, 8, "facts", corpus=f"gold,own,{path}", probes=2)
    gold, own, other = found.numbers["corpora"]
    assert len(gold["pulls"]) == len(other["pulls"]) == 3 and 1 <= len(own["pulls"]) <= 3
    assert own["perplexity"] < gold["perplexity"], (
        "a model's own responses are likelier to it than responses it was not trained on"
    )
    assert finding.write_finding(found, tmp_path / "page.html").read_text().count("<svg") == 2
    path.write_text(json.dumps(lines[0] | {"id": "digit/train/unknown"}) + "\n")
    with pytest.raises(ValueError, match="'digit/train/unknown' is another row"):
        influence.analyze(str(workdir), 2, 3, 8, "facts", corpus=str(path), probes=2)
    for wrong in (
        {k: v for k, v in lines[0].items() if k != "response"},
        lines[0] | {"row": 10**6},
        lines[0] | {"row": None},
    ):
        path.write_text(json.dumps(wrong) + "\n")
        with pytest.raises(
            ValueError,
            match="other.jsonl: expected lines with id, response and a row of this run's data; got",
        ):
            influence.analyze(str(workdir), 2, 3, 8, "facts", corpus=str(path), probes=2)
    with pytest.raises(ValueError, match="--corpus names 'nothing'; expected gold, own"):
        influence.analyze(str(workdir), 2, 3, 8, "facts", corpus="nothing", probes=2)


@pytest.mark.slow
def test_influence_along_a_stage_has_the_weights_of_each_saved_step(workdir, tmp_path):
    """The run keeps its three newest checkpoints; the last step has the weights of the next stage."""
    found = influence.analyze(str(workdir), 1, 2, 4, "facts", corpus="gold", probes=1, steps="all")
    steps = found.numbers["steps"]
    assert list(steps) == ["0", "14", "16", "18", "20"] and len(found.charts) == 4
    perplexity = [step["gold"]["perplexity"] for step in steps.values()]
    assert perplexity[0] > 2 * perplexity[1], "training makes the gold responses likelier"
    with open_probe(workdir, 1, "facts", "float32") as (probe, _):
        end = probe.at_step(20).trained
        with open_probe(workdir, 2, "facts", "float32") as (next_probe, _):
            jax.tree.map(np.testing.assert_array_equal, end, next_probe.trained)
        with pytest.raises(
            ValueError, match="step 7 of stage 1 is not saved; there are 0, 14, 16, 18"
        ):
            probe.at_step(7)
        with pytest.raises(ValueError, match="--steps='x': expected all"):
            influence.chosen_steps(probe, "x")


def test_a_run_without_checkpoints_has_the_start_of_its_first_stage(workdir, tmp_path):
    """As after a run with checkpoint.keep_stages=False."""
    shutil.copytree(workdir, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    with open_probe(tmp_path / "run", 1, "facts", "float32") as (probe, _):
        assert probe.saved_steps() == [0] and probe.at_step(0) is probe
        with pytest.raises(ValueError, match="step 20 of stage 1 is not saved; there are 0 "):
            probe.at_step(20)


def test_risks_of_a_run_follow_from_its_gradients(workdir, tmp_path):
    found = gradient_risk.analyze(str(workdir), 2, rows=4, samples=4, others="facts", probes=2)
    prompts = found.numbers["prompts"]
    assert len(prompts) == 4 and all(p["sft"] > 0 for p in prompts)
    assert {(p["variance"] > 0, p["rft"] > 0, p["ratio"] is not None) for p in prompts} <= {
        (True, True, True),
        (False, False, False),
    }
    assert any(p["variance"] for p in prompts), "the hash grades some prompts both ways"
    assert all(p["group"] <= p["rft"] * (1 + 1e-5) for p in prompts), (
        "the risk of a mean is at most the mean of risks"
    )
    with open_probe(workdir, 2, "facts", "float32") as (probe, _):
        answers = probe.gold_test_responses("facts", 2)
        squares = [jax.tree.map(np.square, probe.gradient(e)) for e in answers]
        gradient = probe.gradient(
            probe.with_gold_response(probe.encode_prompts(probe.training_rows(4))[0])
        )
        expected = np.mean([dot(s, jax.tree.map(np.square, gradient)) for s in squares])
    assert prompts[0]["sft"] == pytest.approx(expected, rel=1e-3)


def test_weight_distances_of_a_run_add_up_over_parts(workdir):
    (run,) = read.read_arms([workdir])[0].runs
    first = drift.add_weight_distances(
        run, [drift.StageDrift("run", "seed0", s, 0.1, {}) for s in (1, 2)]
    )
    assert (
        [s.stage for s in first] == [1, 2]
        and first[0].far["weights, L2"] > 0
        and set(first[0].parts) == {"text", "vision", "merger"}
    )
    assert sum(p["L2"] ** 2 for p in first[1].parts.values()) == pytest.approx(
        first[1].far["weights, L2"] ** 2, rel=1e-5
    )


@pytest.mark.parametrize(
    "argv, message",
    [
        (["influence", "{w}", "--stage=3"], "--stage=3; the run has stages 1 to 2"),
        (
            ["fisher", "{w}", "--others=none"],
            "--others names none; the config evaluates colour, digit, facts",
        ),
        (["fisher", "{w}", "--samples=1"], "expected at least one row, one probe and two samples"),
        (["influence", "{w}", "--lr=0"], "expected numbers above 0"),
        (["influence", "nowhere"], "nowhere has no config.json"),
        (["drift", "nowhere"], "nowhere is not a run"),
        (["pareto", "{w}"], "1 arms have an accuracy and a loss on other tasks, of fewer than two"),
        (["parity", "--seeds=0"], "--seeds=0: expected at least one seed"),
        (["influence", "{w}", "--out={w}"], "expected the path of a page, got a folder"),
        (["mixture", "--out="], "expected the path of a page, got no name"),
        (["mixture", "--out={w}/a.json"], "expected the path of a page, got that of its numbers"),
        (["mixture", "--out=gs://bucket/a.html"], "expected a folder on a disk"),
        (["wrong"], "invalid choice: 'wrong'"),
        (["influence", "{w}", "--stage=x"], "invalid int value: 'x'"),
    ],
)
def test_a_mistake_prints_one_line(workdir, argv, message, monkeypatch, capsys):
    from launch import analyze

    monkeypatch.setattr(sys, "argv", ["analyze.py", *(a.format(w=workdir) for a in argv)])
    with pytest.raises(SystemExit) as left:
        analyze.main()
    error = capsys.readouterr().err
    assert left.value.code == 2 and message in error and len(error.strip().splitlines()) == 1


def test_wrong_steps_are_refused_before_anything_is_sampled(workdir, monkeypatch):
    monkeypatch.setattr(influence, "corpus_responses", lambda *_: pytest.fail("sampled"))
    with pytest.raises(ValueError, match="--steps='abc': expected all, or numbers of steps"):
        influence.analyze(workdir, stage=1, rows=2, samples=2, probes=2, steps="abc")


def test_several_processes_are_refused_in_one_line(monkeypatch, capsys):
    from launch import analyze

    monkeypatch.setenv("CPTJAX_DISTRIBUTED", "1")
    monkeypatch.setattr(sys, "argv", ["analyze.py", "drift", "nowhere"])
    with pytest.raises(SystemExit, match="2"):
        analyze.main()
    error = capsys.readouterr().err
    assert error.startswith("error: analyses run in one process, got CPTJAX_DISTRIBUTED=1; unset")
