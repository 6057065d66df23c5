"""The sentences that compare arms: which differences are claimed, and which are not."""

import types

import numpy as np
import pytest
from report_runs import make_run

from cptjax.evaluation.report import differences, headline, read


def make_arm(label, values, stderr=0.0):
    """An arm of finished runs with these values of FM, one per seed."""
    table = types.SimpleNamespace(finished=True)
    runs = [
        types.SimpleNamespace(
            variant=f"seed{seed}",
            table=table,
            metric=lambda name, value=value: {"value": value, "stderr": stderr},
            summary={"metrics": {"fm_diagonal": {"value": value}}},
        )
        for seed, value in enumerate(values)
    ]
    return read.Arm(label, tuple(runs))


def sentence(*arms):
    return headline.best_and_worst_sentence(arms, "fm_diagonal", "{best} {worst}", "alike")


def test_arms_that_differ_within_noise_are_not_ranked(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        make_run(tmp_path / name, "grpo", seed=seed)
    sentences = headline.comparison_headline(read.read_arms([tmp_path]))
    assert sentences[0].startswith(
        "What they keep of what they learned does not differ beyond chance (FM <b>−"
    )
    assert sentences[-1] == "One seed each: differences of a few points may be chance."
    for name in ("a", "b"):
        for seed in range(2):
            make_run(tmp_path / "seeds" / name / f"seed{seed}", "grpo", seed=seed)
    sentences = headline.comparison_headline(read.read_arms([tmp_path / "seeds"]))
    assert sentences[0].startswith(
        "What they keep of what they learned does not differ beyond chance (FM <b>−"
    )
    assert sentences[-1].startswith("At most <b>2</b> seeds each")


def test_arms_that_differ_in_every_seed_are_ranked_although_seeds_vary():
    """If there are six seeds: of three that are chance, all have the same sign in one case of 4."""
    calm = make_arm("calm", (0.0, -0.01, 0.0, -0.01, 0.0, 0.0))
    values = (-0.1, -0.7, -0.15, -0.1, -0.05, -0.1)
    assert "each of the <b>6</b> seeds" in sentence(calm, make_arm("wild", values))
    assert sentence(calm, make_arm("wild", (*values[:5], 0.01))) == "alike"
    for few in (2, 3, 5):
        assert sentence(calm, make_arm("wild", values[:few])) == "alike"
    # Of the pairs of three arms, one agrees in all of six seeds by chance more often than 5 %.
    assert sentence(calm, make_arm("wild", values), make_arm("other", values)) == "alike"


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("arms", [2, 4])
def test_equal_arms_are_told_apart_in_at_most_5_of_100_cases(seeds, arms):
    """The normal quantile and unpaired errors did it in 12 to 41."""
    rng = np.random.default_rng(0)
    claims = [
        sentence(*(make_arm(f"x{i}", row) for i, row in enumerate(values))) != "alike"
        for values in rng.normal(-0.1, 0.02, (400, arms, seeds))
    ]
    assert np.mean(claims) < 0.07  # 5 % and two standard errors


def test_a_difference_that_all_seeds_share_is_claimed_although_the_seeds_vary():
    """Pairs cancel what a seed changes in both arms."""
    good, bad = make_arm("good", (-0.1, -0.3, -0.5)), make_arm("bad", (-0.15, -0.36, -0.55))
    assert sentence(good, bad) == "<b>good</b> <b>bad</b>"
    d = differences.paired_difference(good, bad, "fm_diagonal")
    assert d.is_clear and d.half_width_among(3) > d.half_width_among(1) == d.half_width
    # t for 2 degrees of freedom at 1 - 0.025 / 3, from a printed table: 7.65.
    assert d.half_width_among(3) == pytest.approx(7.649 * d.sd / 3**0.5, rel=1e-3)


def test_single_runs_are_compared_by_the_errors_of_their_test_examples():
    arms = [make_arm("a", (0.0,), 0.01), make_arm("b", (-0.03,), 0.01)]
    assert sentence(*arms) == "<b>a</b> <b>b</b>"  # 3 points, interval 2.8
    between = make_arm("c", (-0.01,), 0.01)
    assert sentence(*arms, between) == "alike"  # of three pairs: 3.4
    assert sentence(arms[0], make_arm("d", (-0.03, -0.04), 0.01)) == "alike"  # one pair
