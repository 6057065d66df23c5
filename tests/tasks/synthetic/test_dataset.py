"""Synthetic tasks: examples depend only on seed, split and index; splits share no image."""

import time

import cloudpickle
import numpy as np
import pytest

from cptjax.tasks.registry import BUILT_IN_TASKS, resolve_task
from cptjax.tasks.synthetic.dataset import (
    ANSWER_STYLES,
    biased_classes,
    generate_block,
    make_synthetic_task,
    styled_exact,
)
from cptjax.tasks.synthetic.families import (
    SYNTHETIC_FAMILIES,
    SyntheticSpec,
)

IMAGE_FAMILIES = sorted(set(SYNTHETIC_FAMILIES) - {"facts", "arithmetic"})


@pytest.mark.parametrize("family", SYNTHETIC_FAMILIES)
def test_an_example_depends_on_seed_split_and_index_alone(family):
    spec = SyntheticSpec(family, styles=(("it is", 0.5), ("", 0.5)), bias=0.0)
    whole, alone = generate_block(spec, "train", 3, 0, 50), generate_block(spec, "train", 3, 37, 38)
    assert (whole.questions[37], whole.answers[37], whole.styles[37]) == (
        alone.questions[0],
        alone.answers[0],
        alone.styles[0],
    )
    assert whole.images is None or np.array_equal(whole.images[37], alone.images[0])
    other = generate_block(spec, "train", 4, 0, 50)
    assert (whole.answers, whole.questions) != (other.answers, other.questions)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_no_image_is_in_two_splits_or_twice_in_one(family):
    seen = {}
    for split in ("train", "validation", "test"):
        images = generate_block(SyntheticSpec(family), split, 0, 0, 200).images
        assert images.shape == (200, 32, 32, 3) and images.dtype == np.uint8
        seen[split] = {image.tobytes() for image in images}
        assert len(seen[split]) == 200
        assert {int(image[0, 0, 0]) % 4 for image in images} == {
            ("train", "validation", "test").index(split)
        }
    assert not seen["train"] & seen["test"] and not seen["validation"] & seen["test"]


def test_biased_labels_replace_a_fixed_half_of_the_classes():
    spec = SyntheticSpec("digit", bias=0.55)
    wrong = biased_classes(spec)
    assert len(wrong) == 5 and all(truth != label for truth, label in wrong.items())
    block = generate_block(spec, "train", 0, 0, 3000)
    pairs = list(zip(block.answers, block.labels, strict=True))
    changed = [truth != label for truth, label in pairs if truth in wrong]
    assert 0.5 < np.mean(changed) < 0.6
    assert all(label == truth or label == wrong.get(truth) for truth, label in pairs)
    assert np.array_equal(
        block.images, generate_block(SyntheticSpec("digit"), "train", 0, 0, 3000).images
    )


def test_styles_word_the_target_in_their_shares_and_leave_the_answer_bare():
    task = resolve_task(
        "base",
        {
            "base": {
                "task": "synthetic",
                "family": "shape",
                "styles": {"it is": 0.4, "answer :": 0.3, "i think": 0.3},
            }
        },
    )
    examples = task.load("train", limit=1000)
    shares = [
        np.mean([example.meta["style"] == style for example in examples])
        for style in ANSWER_STYLES[:3]
    ]
    assert np.allclose(shares, [0.4, 0.3, 0.3], atol=0.05)
    assert all(
        example.target == f"{example.meta['style']} {example.answer}" for example in examples
    )
    assert task.forced_prefix == "it is" and task.template == "none"
    assert (
        BUILT_IN_TASKS["synthetic_shape"].load("train")[0].target
        == BUILT_IN_TASKS["synthetic_shape"].load("train")[0].answer
    )


def test_the_verifier_is_lenient_on_style_and_strict_on_the_rest():
    for good in (
        "red",
        "it is red",
        " answer : red\n",
        "answer: red",
        "i think red",
        "the answer is red",
    ):
        assert styled_exact(good, "red") == 1.0, good
    for bad in (
        "",
        "it is",
        "red red",
        "it is red.",
        "it is i think red",
        "blue",
        "it is dark red",
        "bored",
    ):
        assert styled_exact(bad, "red") == 0.0, bad


def test_any_limit_is_possible_and_the_first_rows_stay_the_same():
    task = BUILT_IN_TASKS["synthetic_count"]
    assert len(task.load("train", limit=25_000)) == 25_000
    short, long = task.load("test", limit=10), task.load("test", limit=200)
    assert [e.answer for e in short] == [e.answer for e in long][:10] and long[
        7
    ].id == "synthetic_count/test/7"
    assert (
        cloudpickle.loads(cloudpickle.dumps(long))[199].answer
        == long[199].answer
        == long[-1].answer
    )
    with pytest.raises(IndexError):
        short[10]


def test_sides_and_settings():
    (example,) = make_synthetic_task(family="jigsaw3", side=100).load("train", limit=1)
    assert example.messages[0]["content"][0]["image"].size == (100, 100)
    for wrong, message in [
        ({"family": "colours"}, "no family 'colours'.*did you mean 'colour'"),
        ({"family": "facts", "level": 2}, "level=2"),
        ({"bias": 1.5}, "bias=1.5"),
        ({"styles": {"maybe": 1.0}}, "styles: expected weights"),
        ({"family": "jigsaw3", "bias": 0.5}, "too many classes"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_synthetic_task(**wrong)
    with pytest.raises(ValueError, match="no split 'dev'"):
        BUILT_IN_TASKS["synthetic_shape"].load("dev")


def test_generation_is_fast_enough_for_training():
    """The goal is 5,000 images/s; the bound is lower, for machines that run other tests."""
    generate_block(SyntheticSpec("colour"), "train", 0, 0, 64)
    started = time.process_time()
    for block in range(10):
        generate_block(SyntheticSpec("colour"), "train", 0, 64 * block, 64 * (block + 1))
    assert 640 / (time.process_time() - started) > 2000
