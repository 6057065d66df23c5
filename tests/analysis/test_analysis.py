"""The papers' explanations as measurements: against their reference numbers, planted laws, hand-computed risks, and gradients."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_helpers
from device_fixtures import see

from cptjax.analysis import drift, finding, fisher, influence, mixture
from cptjax.analysis.mixture import MixtureSetting
from cptjax.analysis.probe import open_probe
from cptjax.common import files, run_log
from cptjax.continual import driver
from cptjax.evaluation.report import read
from cptjax.models import logprobs

ROOT = Path(__file__).parents[2]

# ---- mixture -------------------------------------------------------------------------------------

FORWARD, SLOW_FORWARD, REVERSE, ONE_FORWARD, ONE_REVERSE = mixture.MIXTURE_SETTINGS


def at_enough(path):
    return path.enough, path.drop[path.enough]


def test_the_start_covers_what_the_authors_script_says():
    assert mixture.mode_overlaps(FORWARD, FORWARD.start) == pytest.approx((0.803, 0.032), abs=5e-4)
    assert mixture.mode_overlaps(ONE_FORWARD, ONE_FORWARD.start) == pytest.approx(
        (0.900, 0.0001), abs=5e-4
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_two_modes_forget_by_forward_kl_only(seed):
    """Reference: gain .9 after 83 to 87 steps with drop .124 to .129, and after 124 to 126 with .027 to .031."""
    forward, reverse = (mixture.simulate_mixture(s, seed) for s in (FORWARD, REVERSE))
    assert at_enough(forward) == (pytest.approx(85, abs=4), pytest.approx(0.126, abs=0.006))
    assert at_enough(reverse) == (pytest.approx(125, abs=5), pytest.approx(0.03, abs=0.012))
    assert (forward.gain[-1], forward.drop[-1], forward.share) == pytest.approx(
        (0.968, 0.290, 0.397), abs=2e-3
    )
    slow = mixture.simulate_mixture(SLOW_FORWARD, seed)
    assert slow.enough is None and (slow.gain.max(), slow.drop[-1]) == pytest.approx(
        (0.435, 0.021), abs=2e-3
    )


def test_one_mode_forgets_by_either_and_more_by_reverse_kl():
    forward, reverse = mixture.simulate_mixture(ONE_FORWARD), mixture.simulate_mixture(ONE_REVERSE)
    assert at_enough(forward)[1] == pytest.approx(0.639, abs=0.006)
    assert at_enough(reverse) == (pytest.approx(295, abs=12), pytest.approx(0.692, abs=0.012))
    assert forward.drop[-1] == pytest.approx(0.9, abs=1e-3) and reverse.drop[-1] == pytest.approx(
        0.9, abs=1e-3
    )


def test_the_score_is_the_gradient_of_the_log_density():
    x, q = np.linspace(-4, 3, 13), np.array([0.3, -2.0, 1.3, 1.5, 0.6])
    logq = lambda q: np.log(
        q[0] * mixture.normal_density(x, q[1], q[2])
        + (1 - q[0]) * mixture.normal_density(x, q[3], q[4])
    )
    slopes = [(logq(q + h) - logq(q - h)) / 2e-6 for h in 1e-6 * np.eye(5)]
    assert np.allclose(mixture.density_and_score(x, q)[1], slopes, atol=1e-5)


def test_the_finding_compares_at_equal_gain(tmp_path):
    found = mixture.analyze()
    page = finding.write_finding(found, tmp_path / "mixture.html")
    assert "0.124" in found.sentences[0] and page.read_text().count("<svg") == 2
    assert (
        len(json.loads((tmp_path / "mixture.json").read_text())["paths"])
        == len(found.tables[0].rows)
        == 11
    )
    assert (
        mixture.simulate_mixture(MixtureSetting(2, "reverse", 0.01, 5), 3).gain.tolist()
        == mixture.simulate_mixture(MixtureSetting(2, "reverse", 0.01, 5), 3).gain.tolist()
    )


# ---- drift ---------------------------------------------------------------------------------------


def run_with(folder, rows):
    """A workdir of one stage per (KL on the new task, KL on the general one, loss of the general one)."""
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
        run_with(tmp_path / name, [(x, rng.uniform(), 0.1 * x + 0.4 * x**2) for x in new])
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


def test_too_few_stages_for_a_fit_are_told(tmp_path):
    run_with(tmp_path / "one", [(0.1, 0.2, 0.3), (0.2, 0.1, 0.2), (0.3, 0.3, 0.1)])
    with pytest.raises(ValueError, match="3 stages have a loss.*needs at least 4.*eval.drift"):
        drift.analyze([tmp_path / "one"])
    run_with(tmp_path / "flat", [(0.1 * i, 0.2 * i, 0.1) for i in range(4)])
    with pytest.raises(ValueError, match="all 4 stages have lost the same"):
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


# ---- fisher --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "p, ratio",
    [(0.01, 0.99), (0.1, 0.90), (0.25, 0.78), (0.5, 1.0), (0.75, 7), (0.9, 73), (0.99, 9703)],
)
def test_the_claim_fails_where_most_answers_are_right(p, ratio):
    """A softmax of two outcomes, F = I: the gradient of -log p(a) by the logits is p - onehot(a)."""
    slope = {"right": np.array([p - 1, 1 - p]), "wrong": np.array([p, -p])}
    gradient = lambda name: {"z": jnp.asarray(slope[name], jnp.float32)}
    answers = [("right", 1.0)] * round(100 * p) + [("wrong", 0.0)] * round(100 * (1 - p))
    found = fisher.prompt_risk("x", 2 * (1 - p) ** 2, answers, {"z": jnp.ones(2)}, gradient)
    assert found.ratio == pytest.approx(ratio, rel=0.01)
    assert (found.mean, found.variance) == pytest.approx((p, p * (1 - p)))
    assert found.group == pytest.approx(
        2 * (p * (1 - p)) ** 2, rel=1e-4
    )  # the policy gradient p (1 - p) (1, -1)


def test_equal_rewards_risk_nothing_and_ask_for_no_gradient():
    found = fisher.prompt_risk(
        "x", 1.0, [("a", 1.0), ("b", 1.0)], {"z": jnp.ones(2)}, lambda name: pytest.fail("asked")
    )
    assert (found.rft, found.group, found.ratio) == (0, 0, None)


# ---- influence -----------------------------------------------------------------------------------


def test_steepness_is_the_squared_gradient_by_the_logits():
    rng = np.random.default_rng(0)
    hidden, unembed, targets = (
        rng.normal(size=(7, 4)),
        rng.normal(size=(4, 9)),
        rng.integers(0, 9, 7),
    )
    arrays = (
        jnp.asarray(hidden, jnp.float32),
        jnp.asarray(unembed, jnp.float32),
        jnp.asarray(targets),
    )
    z = hidden @ unembed
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    expected = np.square(np.eye(9)[targets] - p).sum(1)
    for chunk in (3, 100):
        assert np.allclose(logprobs.logit_gradient_norm(*arrays, chunk=chunk), expected, rtol=1e-5)


def test_asymmetry_is_relative():
    assert influence.asymmetry(np.array([[1.0, -2.0]]), np.array([[1.0, -2.0]])) == 0
    assert influence.asymmetry(np.array([[1.0, 1.0]]), np.array([[-1.0, -1.0]])) == 2


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run whose first stage learns to answer and to end; a coin that knows the answer's text says which are right."""
    folder = tmp_path_factory.mktemp("analysis")
    (folder / "coin.py").write_text(
        "import zlib\n\n\ndef score(prediction, answer, **meta):\n    return float(zlib.crc32(prediction.encode()) % 2)\n"
    )
    drawn = lambda family: dict(
        task="synthetic", family=family, side=32, scorer=f"{folder / 'coin.py'}:score"
    )
    tasks = {family: drawn(family) for family in (*run_helpers.TASKS, "facts")}
    c = run_helpers.config(
        "sft", steps=3, tasks=tasks, eval=dict(general=("facts",), limit=4, batch=4, drift=4)
    )
    c.stages = (dict(task="colour", steps=20), dict(task="digit", steps=2))
    with pytest.MonkeyPatch.context() as patch:
        see(patch, 1)
        driver.run(c, folder / "run")
        yield folder / "run"


def dot(a, b):
    return sum(
        float(jnp.vdot(x, y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
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
def test_all_corpora_side_by_side(workdir, tmp_path):
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
        "what a model says itself is likelier to it than what it was never taught"
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


def test_risks_of_a_run(workdir, tmp_path):
    found = fisher.analyze(str(workdir), 2, rows=4, samples=4, others="facts", probes=2)
    prompts = found.numbers["prompts"]
    assert len(prompts) == 4 and all(p["sft"] > 0 for p in prompts)
    assert {(p["variance"] > 0, p["rft"] > 0, p["ratio"] is not None) for p in prompts} <= {
        (True, True, True),
        (False, False, False),
    }
    assert any(p["variance"] for p in prompts), "a coin answers some prompts both ways"
    assert all(p["group"] <= p["rft"] * (1 + 1e-5) for p in prompts), (
        "the risk of a mean is at most the mean of risks"
    )
    with open_probe(workdir, 2, "facts", "float32") as (probe, _):
        answers = probe.gold_test_responses("facts", 2)
        squares = [jax.tree.map(jnp.square, probe.gradient(e)) for e in answers]
        gradient = probe.gradient(
            probe.with_gold_response(probe.encode_prompts(probe.training_rows(4))[0])
        )
        expected = np.mean([dot(s, jax.tree.map(jnp.square, gradient)) for s in squares])
    assert prompts[0]["sft"] == pytest.approx(expected, rel=1e-3)


def test_weights_of_a_run(workdir):
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
    "argv, said",
    [
        (["influence", "{w}", "--stage=3"], "--stage=3; the run has stages 1 to 2"),
        (
            ["fisher", "{w}", "--others=none"],
            "--others names none; the config evaluates colour, digit, facts",
        ),
        (["fisher", "{w}", "--samples=1"], "expected at least one row and probe, and two samples"),
        (["influence", "{w}", "--lr=0"], "expected numbers above 0"),
        (["influence", "nowhere"], "nowhere has no config.json"),
        (["drift", "nowhere"], "nowhere is no run"),
    ],
)
def test_a_mistake_is_one_line(workdir, argv, said, monkeypatch, capsys):
    from launch import analyze

    monkeypatch.setattr(sys, "argv", ["analyze.py", *(a.format(w=workdir) for a in argv)])
    with pytest.raises(SystemExit) as left:
        analyze.main()
    error = capsys.readouterr().err
    assert left.value.code == 2 and said in error and len(error.strip().splitlines()) == 1


def test_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "launch/analyze.py", "mixture", f"--out={tmp_path / 'm.html'}"],
        cwd=ROOT,
        capture_output=True,
    )
    assert (
        done.returncode == 0
        and (tmp_path / "m.json").exists()
        and b"At equal gain" in done.stdout + done.stderr
    )
