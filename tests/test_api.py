"""The Python interface, and launch/sample.py."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
import run_helpers
from PIL import Image

import cptjax
from cptjax import sharding
from cptjax.data import processor
from cptjax.models.hf_config import locate_checkpoint, read_model_config

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8))
TEXT = {"type": "text", "text": "What is this?"}
CONVERSATIONS = [
    [{"role": "user", "content": "Name a colour."}],
    [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": IMAGE},
                {"type": "text", "text": "What is this?"},
            ],
        }
    ],
    [{"role": "user", "content": [{"type": "text", "text": "Count to three, please."}]}],
]


@pytest.fixture(scope="module")
def model():
    """The tiny preset with logits wide enough for different responses."""
    plain = cptjax.load("tiny", mesh=sharding.make_mesh(devices=jax.devices()[:1]), dtype="float32")
    return dataclasses.replace(
        plain, params=jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, plain.params)
    )


def test_generate_depends_on_the_seed_and_not_on_the_batch(model):
    greedy = cptjax.generate(model, CONVERSATIONS, max_new_tokens=8)
    assert [len(a) for a in greedy] == [1, 1, 1] and all(
        isinstance(a, str) for texts in greedy for a in texts
    )
    sampled = cptjax.generate(model, CONVERSATIONS, n=3, temperature=1.0, max_new_tokens=8)
    assert [len(a) for a in sampled] == [3, 3, 3] and len(
        {a for texts in sampled for a in texts}
    ) > 5
    assert sampled == cptjax.generate(
        model, CONVERSATIONS, n=3, temperature=1.0, max_new_tokens=8, batch=2
    )
    assert sampled != cptjax.generate(
        model, CONVERSATIONS, n=3, temperature=1.0, max_new_tokens=8, seed=1
    )


def test_a_response_ends_before_its_stop_string(model):
    free = cptjax.generate(model, CONVERSATIONS, n=2, temperature=1.0, max_new_tokens=12)
    longest = max((a for texts in free for a in texts), key=len)
    for stop in (longest[3:5], longest[4]):
        cut = cptjax.generate(
            model, CONVERSATIONS, n=2, temperature=1.0, max_new_tokens=12, stop=[stop]
        )
        assert cut == [[a.split(stop)[0] for a in texts] for texts in free]
        assert cut != free


def test_score_is_the_log_probability_by_the_logits(model):
    """The log-probability of a completion is that of its tokens after the conversation."""
    words = ["blue", "a cat sat", "1 2 3"]
    found = cptjax.score(model, CONVERSATIONS, words)
    prompts = cptjax.logits(model, CONVERSATIONS)
    for conversation, word, scores, before in zip(
        CONVERSATIONS, words, found, prompts, strict=True
    ):
        ids = model.processor.ids(word)
        assert scores.shape == (len(ids),)
        want = before[-1] - np.logaddexp.reduce(before[-1].astype(np.float64))
        np.testing.assert_allclose(scores[0], want[ids[0]], atol=1e-4)
        np.testing.assert_allclose(cptjax.score(model, [conversation], [ids])[0], scores, atol=1e-4)


def test_a_saved_folder_loads_as_the_same_model(model, tmp_path):
    """With the same responses and logits, on eight devices too."""
    cptjax.save(model, tmp_path / "saved")
    for mesh in (model.mesh, sharding.make_mesh(2, 2, 2)):
        again = cptjax.load(tmp_path / "saved", mesh=mesh, dtype="float32")
        assert again.config.text == model.config.text and again.config.eos == model.config.eos
        for a, b in zip(
            cptjax.logits(model, CONVERSATIONS), cptjax.logits(again, CONVERSATIONS), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=2e-4)
        assert cptjax.generate(again, CONVERSATIONS, max_new_tokens=6) == cptjax.generate(
            model, CONVERSATIONS, max_new_tokens=6
        )


def test_a_hub_id_loads_as_its_folder(model, tmp_path, monkeypatch):
    """Config and tokenizer alone download no weights; a hub that fails is one line."""
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
        cptjax.logits(again, CONVERSATIONS[:1])[0], cptjax.logits(model, CONVERSATIONS[:1])[0]
    )
    with pytest.raises(
        ValueError,
        match=r"^org/other is neither a local folder nor a model that the hub returns \(Cannot find it\)$",
    ):
        cptjax.load("org/other")
    monkeypatch.chdir(tmp_path)
    for path in ("saved/a.Model-3", "hf:saved/a.Model-3"):  # a folder that is here, and the hub
        with pytest.raises(ValueError, match="hf:saved/" if path[2] == "v" else "that the hub"):
            cptjax.load(path)
    for path in ("org/a/b", "./org", "gs://bucket/x", "~/x"):
        with pytest.raises(ValueError, match="is neither a folder nor a hub id"):
            locate_checkpoint(path)


def test_public_names_are_imported_on_first_use():
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
        (
            lambda m: cptjax.load("tiny", stage=1),
            "stage=1: expected the workdir of a run, got tiny",
        ),
        (lambda m: cptjax.save(m, "gs://bucket/m"), "folder=gs://bucket/m: expected a folder"),
        (lambda m: cptjax.generate(m, []), "expected a list of conversations"),
        (lambda m: cptjax.generate(m, CONVERSATIONS[0]), "expected a list of conversations"),
        (
            lambda m: cptjax.generate(m, CONVERSATIONS, stop=[""]),
            "expected strings with at least one character",
        ),
        (lambda m: cptjax.generate(m, CONVERSATIONS, batch=0), "batch=0"),
        (
            lambda m: cptjax.generate(m, CONVERSATIONS, top_p=0.5),
            "top_p=0.5, top_k=0, min_p=0.0: expected a temperature above 0",
        ),
        (
            lambda m: cptjax.generate(m, [[{"role": "user", "content": None}]]),
            "the content of a message: expected a text or a list of parts, got None",
        ),
        (
            lambda m: cptjax.generate(m, [[{"role": "user", "content": TEXT}]]),
            "the content of a message: expected a text or a list of parts, got {'type'",
        ),
        (
            lambda m: cptjax.generate(m, [[{"role": "user", "content": [{"type": "text"}]}]]),
            "a part of type text: expected a text, got None",
        ),
        (
            lambda m: cptjax.generate(m, [[{"role": "user", "content": [7]}]]),
            "a part of a message: expected type text, image or video, got 7",
        ),
        (lambda m: cptjax.generate(m, CONVERSATIONS, max_new_tokens=0), "max_new_tokens=0"),
        (
            lambda m: cptjax.generate(m, CONVERSATIONS, max_new_tokens=5000),
            "max_new_tokens=5000: expected at most",
        ),
        (lambda m: cptjax.score(m, CONVERSATIONS, ["a"]), "got 1 completions for 3 conversations"),
        (
            lambda m: cptjax.score(m, CONVERSATIONS[:1], [""]),
            "completion 0: expected at least one token",
        ),
        *(
            (
                lambda m, ids=ids: cptjax.score(m, CONVERSATIONS[:2], ["a", ids]),
                "completion 1: expected a text or a list of token ids from 0 to 383",
            )
            for ids in ([0, 384], [-1], [0.5], [[1]])
        ),
    ],
)
def test_a_wrong_call_is_reported_in_one_line(model, call, words):
    with pytest.raises(ValueError, match=words) as error:
        call(model)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_sample_prints_responses_and_one_line_on_a_mistake(tmp_path):
    IMAGE.save(tmp_path / "a.png")
    root = Path(__file__).parents[1]
    env = run_helpers.environment()
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
