"""load, generate, score, logits, save from Python, and launch/sample.py."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
from PIL import Image

import cptjax
from cptjax import sharding
from cptjax.data import processor
from cptjax.models.config import locate_checkpoint, read_model_config

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8))
TALKS = [
    [{"role": "user", "content": "Name a colour."}],
    [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": PICTURE},
                {"type": "text", "text": "What is this?"},
            ],
        }
    ],
    [{"role": "user", "content": [{"type": "text", "text": "Count to three, please."}]}],
]


@pytest.fixture(scope="module")
def model():
    """The tiny preset with logits wide enough to answer differently."""
    plain = cptjax.load("tiny", mesh=sharding.make_mesh(devices=jax.devices()[:1]), dtype="float32")
    return dataclasses.replace(
        plain, params=jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, plain.params)
    )


def test_generate_shape_seed_and_batches(model):
    greedy = cptjax.generate(model, TALKS, max_new_tokens=8)
    assert [len(a) for a in greedy] == [1, 1, 1] and all(
        isinstance(a, str) for answers in greedy for a in answers
    )
    drawn = cptjax.generate(model, TALKS, n=3, temperature=1.0, max_new_tokens=8)
    assert [len(a) for a in drawn] == [3, 3, 3] and len(
        {a for answers in drawn for a in answers}
    ) > 5
    assert drawn == cptjax.generate(model, TALKS, n=3, temperature=1.0, max_new_tokens=8, batch=2)
    assert drawn != cptjax.generate(model, TALKS, n=3, temperature=1.0, max_new_tokens=8, seed=1)


def test_an_answer_ends_before_its_stop_string(model):
    free = cptjax.generate(model, TALKS, n=2, temperature=1.0, max_new_tokens=12)
    longest = max((a for answers in free for a in answers), key=len)
    for stop in (longest[3:5], longest[4]):
        cut = cptjax.generate(model, TALKS, n=2, temperature=1.0, max_new_tokens=12, stop=[stop])
        assert cut == [[a.split(stop)[0] for a in answers] for answers in free]
        assert cut != free


def test_score_equals_logits(model):
    """The log-probability of a completion is that of its tokens after the conversation."""
    words = ["blue", "a cat sat", "1 2 3"]
    found = cptjax.score(model, TALKS, words)
    prompts = cptjax.logits(model, TALKS)
    for talk, word, scores, before in zip(TALKS, words, found, prompts, strict=True):
        ids = model.processor.ids(word)
        assert scores.shape == (len(ids),)
        want = before[-1] - np.logaddexp.reduce(before[-1].astype(np.float64))
        np.testing.assert_allclose(scores[0], want[ids[0]], atol=1e-4)
        np.testing.assert_allclose(cptjax.score(model, [talk], [ids])[0], scores, atol=1e-4)


def test_save_and_load(model, tmp_path):
    """A saved folder gives the same answers and logits, on eight devices too."""
    cptjax.save(model, tmp_path / "saved")
    for mesh in (model.mesh, sharding.make_mesh(2, 2, 2)):
        again = cptjax.load(tmp_path / "saved", mesh=mesh, dtype="float32")
        assert again.config.text == model.config.text and again.config.eos == model.config.eos
        for a, b in zip(cptjax.logits(model, TALKS), cptjax.logits(again, TALKS), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4)
        assert cptjax.generate(again, TALKS, max_new_tokens=6) == cptjax.generate(
            model, TALKS, max_new_tokens=6
        )


def test_a_model_of_the_hub(model, tmp_path, monkeypatch):
    """The same model as from its folder; for its shape and tokenizer alone no weights are asked for; a hub that fails is one line."""
    cptjax.save(model, tmp_path / "saved")
    asked = []

    def download(name, allow_patterns):
        asked.append((name, *allow_patterns))
        if name != "org/a.Model-3":
            raise FileNotFoundError("Cannot find it\nin the cache")
        return str(tmp_path / "saved")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    cfg = read_model_config("org/a.Model-3")
    assert processor.load_processor("org/a.Model-3", cfg).template and asked == [
        ("org/a.Model-3", "*.json", "*.txt", "*.jinja")
    ]
    again = cptjax.load("org/a.Model-3", mesh=model.mesh, dtype="float32")
    assert asked[1:] == [(*asked[0], "*.safetensors")]
    np.testing.assert_array_equal(
        cptjax.logits(again, TALKS[:1])[0], cptjax.logits(model, TALKS[:1])[0]
    )
    with pytest.raises(
        ValueError,
        match=r"^org/other is neither a local folder nor a model that the hub returns \(Cannot find it\)$",
    ):
        cptjax.load("org/other")
    for path in ("org/a/b", "./org", "gs://bucket/x", "~/x"):
        with pytest.raises(ValueError, match="is neither a folder nor a hub id"):
            locate_checkpoint(path)


def test_names_are_looked_up_when_used():
    """The package itself loads without jax, for modules that only read text."""
    code = "import sys, cptjax, cptjax.common.run_log; assert 'jax' not in sys.modules; print(sorted(cptjax.__all__)); cptjax.nothing"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert "'generate', 'load', 'logits', 'run', 'save', 'score'" in out.stdout
    assert "module 'cptjax' has no attribute 'nothing'" in out.stderr


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda m: cptjax.load("nowhere"),
            "nowhere is neither a folder nor a hub id .*presets are 3b",
        ),
        (
            lambda m: cptjax.load("tiny", dtype="float8"),
            "dtype='float8'; expected one of float32, bfloat16",
        ),
        (lambda m: cptjax.generate(m, []), "expected a list of conversations"),
        (lambda m: cptjax.generate(m, TALKS[0]), "expected a list of conversations"),
        (
            lambda m: cptjax.generate(m, TALKS, stop=[""]),
            "expected strings with at least one character",
        ),
        (lambda m: cptjax.generate(m, TALKS, batch=0), "batch=0"),
        (lambda m: cptjax.generate(m, TALKS, max_new_tokens=0), "max_new_tokens=0"),
        (lambda m: cptjax.generate(m, TALKS, max_new_tokens=5000), "5000 new ones exceed"),
        (lambda m: cptjax.score(m, TALKS, ["a"]), "got 1 completions for 3 conversations"),
        (lambda m: cptjax.score(m, TALKS[:1], [""]), "completion 0: expected at least one token"),
    ],
)
def test_wrong_calls_are_one_line(model, call, words):
    with pytest.raises(ValueError, match=words) as error:
        call(model)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_launcher_prints_answers_and_ends_with_one_line_on_a_mistake(tmp_path):
    PICTURE.save(tmp_path / "a.png")
    root = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": str(root)}
    run = lambda *flags: subprocess.run(
        [sys.executable, "launch/sample.py", *flags],
        capture_output=True,
        text=True,
        cwd=root,
        env=env,
    )
    ask = (
        "--model=tiny",
        "--prompt=What is this?",
        f"--image={tmp_path}/a.png",
        "--max_new_tokens=4",
    )
    out = run(*ask, "--n=2", "--temperature=1")
    assert out.returncode == 0 and "--- 1 of 2\n" in out.stdout and "--- 2 of 2\n" in out.stdout, (
        out.stderr
    )
    out = run(*ask, "--image=none.png")
    assert out.returncode == 2 and "none.png" in out.stderr and "Traceback" not in out.stderr, (
        out.stderr
    )
