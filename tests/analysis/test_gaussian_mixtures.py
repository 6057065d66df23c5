"""The mixture simulation against the reference numbers of the authors' script."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cptjax.analysis import finding, gaussian_mixtures
from cptjax.analysis.gaussian_mixtures import MixtureSetting

ROOT = Path(__file__).parents[2]
FORWARD, SLOW_FORWARD, REVERSE, ONE_FORWARD, ONE_REVERSE = gaussian_mixtures.MIXTURE_SETTINGS


def at_enough(path):
    return path.enough, path.drop[path.enough]


def test_the_start_has_the_overlaps_of_the_authors_script():
    assert gaussian_mixtures.mode_overlaps(FORWARD, FORWARD.start) == pytest.approx(
        (0.803, 0.032), abs=5e-4
    )
    assert gaussian_mixtures.mode_overlaps(ONE_FORWARD, ONE_FORWARD.start) == pytest.approx(
        (0.900, 0.0001), abs=5e-4
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_two_modes_forget_by_forward_kl_only(seed):
    """Reference: gain .9 after 83-87 steps with drop .124-.129, or 124-126 with .027-.031."""
    forward, reverse = (gaussian_mixtures.simulate_mixture(s, seed) for s in (FORWARD, REVERSE))
    assert at_enough(forward) == (pytest.approx(85, abs=4), pytest.approx(0.126, abs=0.006))
    assert at_enough(reverse) == (pytest.approx(125, abs=5), pytest.approx(0.03, abs=0.012))
    assert (forward.gain[-1], forward.drop[-1], forward.share) == pytest.approx(
        (0.968, 0.290, 0.397), abs=2e-3
    )
    slow = gaussian_mixtures.simulate_mixture(SLOW_FORWARD, seed)
    assert slow.enough is None and (slow.gain.max(), slow.drop[-1]) == pytest.approx(
        (0.435, 0.021), abs=2e-3
    )


def test_one_mode_forgets_by_either_and_more_by_reverse_kl():
    forward, reverse = (
        gaussian_mixtures.simulate_mixture(ONE_FORWARD),
        gaussian_mixtures.simulate_mixture(ONE_REVERSE),
    )
    assert at_enough(forward)[1] == pytest.approx(0.639, abs=0.006)
    assert at_enough(reverse) == (pytest.approx(295, abs=12), pytest.approx(0.692, abs=0.012))
    assert forward.drop[-1] == pytest.approx(0.9, abs=1e-3) and reverse.drop[-1] == pytest.approx(
        0.9, abs=1e-3
    )


def test_the_score_is_the_gradient_of_the_log_density():
    x, q = np.linspace(-4, 3, 13), np.array([0.3, -2.0, 1.3, 1.5, 0.6])
    logq = lambda q: np.log(
        q[0] * gaussian_mixtures.normal_density(x, q[1], q[2])
        + (1 - q[0]) * gaussian_mixtures.normal_density(x, q[3], q[4])
    )
    slopes = [(logq(q + h) - logq(q - h)) / 2e-6 for h in 1e-6 * np.eye(5)]
    assert np.allclose(gaussian_mixtures.density_and_score(x, q)[1], slopes, atol=1e-5)


def test_the_finding_compares_at_equal_gain(tmp_path):
    found = gaussian_mixtures.analyze()
    page = finding.write_finding(found, tmp_path / "mixture.html")
    assert "0.124" in found.sentences[0] and page.read_text().count("<svg") == 2
    assert (
        len(json.loads((tmp_path / "mixture.json").read_text())["paths"])
        == len(found.tables[0].rows)
        == 11
    )
    assert (
        gaussian_mixtures.simulate_mixture(MixtureSetting(2, "reverse", 0.01, 5), 3).gain.tolist()
        == gaussian_mixtures.simulate_mixture(
            MixtureSetting(2, "reverse", 0.01, 5), 3
        ).gain.tolist()
    )


def test_the_command_writes_page_and_numbers(tmp_path):
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
