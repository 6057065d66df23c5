"""Synthetic Countdown puzzles are solvable, and no puzzle is in two splits."""

from cptjax.tasks.datasets import countdown
from cptjax.tasks.registry import TASK_MAKERS
from cptjax.tasks.scoring import scorers
from cptjax.tasks.scoring.puzzles import evaluate_arithmetic


def test_synthetic_puzzles_have_the_solution_in_their_target():
    seen = {}
    for split in ("train", "test"):
        for example in TASK_MAKERS["countdown"]("c", synthetic=True, count=4).load(split, limit=60):
            assert evaluate_arithmetic(example.target) is not None, example.target
            assert (
                scorers.find_scorer("countdown").score(example.target, example.answer, example.meta)
                == 1.0
            )
            seen.setdefault(split, set()).add((*sorted(example.meta["nums"]), example.answer))
    assert not seen["train"] & seen["test"]
    assert (
        countdown.make_puzzle("train", 0, 3, 3, 20)
        == countdown.make_puzzle("train", 0, 3, 3, 20)
        != countdown.make_puzzle("train", 1, 3, 3, 20)
    )
