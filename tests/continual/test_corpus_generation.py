"""A corpus from a checkpoint or another model: graded, resumable to the same bytes, with origin."""

import pytest
import run_helpers
from device_fixtures import one_device  # noqa: F401

from cptjax.common import files
from cptjax.continual import corpus_generation
from cptjax.continual.corpus_generation import CorpusRequest, generate_corpus
from cptjax.training import corpus

pytestmark = pytest.mark.usefixtures("one_device")


def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples():
    from itertools import combinations

    graded = (1, 0, 0, 1, 0)
    for k in range(1, 6):
        chosen = [max(c) for c in combinations(graded, k)]
        assert corpus_generation.pass_at_k(2, 5, k) == pytest.approx(sum(chosen) / len(chosen))


def test_the_summary_counts_rows_and_responses():
    grades = [[1, 1, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]]
    lines = [
        {"rewards": {"accuracy": float(r), "reward": float(r)}, "finished": bool(r)}
        for row in grades
        for r in row
    ]
    found = corpus_generation.summarise_corpus(lines, 3)
    assert (found["responses"], found["correct"], found["finished_share"]) == (12, 5, 5 / 12)
    assert (found["never_solved"], found["always_solved"]) == (0.25, 0.25)
    assert found["pass_at_k"] == pytest.approx({1: 5 / 12, 2: (1 + 0 + 2 / 3 * 2) / 4, 3: 0.75})


@pytest.mark.slow
def test_a_corpus_of_a_stage_resumes_to_the_same_bytes_and_feeds_other_runs(tmp_path, monkeypatch):
    config, _ = run_helpers.run_quickly(
        tmp_path / "run", stages=run_helpers.TEXT_STAGES[1:], model=run_helpers.TEXT
    )
    request = CorpusRequest("words", samples=3, rows=10, max_new_tokens=3, temperature=1.3)
    calls = []
    sample, killed_at = corpus_generation.generate.sample_responses, 0

    def count_calls(*args, **kwargs):
        calls.append(len(calls))
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        return sample(*args, **kwargs)

    monkeypatch.setattr(corpus_generation.generate, "sample_responses", count_calls)
    made = lambda name, r=request: generate_corpus(config, tmp_path / "run", r, tmp_path / name)
    whole = made("whole.jsonl")
    parts = len(calls)
    killed_at = parts + 2
    with pytest.raises(KeyboardInterrupt):
        made("killed.jsonl")
    assert not (tmp_path / "killed.jsonl").exists()
    assert made("killed.jsonl")["cost"]["rollouts"] == whole["cost"]["rollouts"] == 30
    assert len(calls) == 2 * parts + 1  # only the part that was stopped is sampled again
    text = (tmp_path / "whole.jsonl").read_bytes()
    assert (tmp_path / "killed.jsonl").read_bytes() == text and not list(tmp_path.glob(".*"))
    lines = files.read_jsonl(tmp_path / "whole.jsonl")
    assert len(lines) == 30 and {line["finished"] for line in lines} <= {True, False}
    assert [line["row"] for line in lines] == sorted(line["row"] for line in lines)
    origin = corpus.find_provenance(tmp_path / "whole.jsonl", "x")
    assert (origin["stage"], origin["run"]) == (1, str(tmp_path / "run"))
    assert origin["sampling"]["temperature"] == 1.3 and origin["correct"] == whole["correct"]
    ids = list(dict.fromkeys(line["id"] for line in lines))
    counts = corpus.count_correct_responses(str(tmp_path / "whole.jsonl"), ids, 3)
    assert counts.sum() == whole["correct"]
    # The base model as a teacher gives the responses of stage 0; a finished file is not replaced.
    base = made("base.jsonl", CorpusRequest("words", 3, stage=0, rows=10, max_new_tokens=3))
    assert base["fingerprint"] != whole["fingerprint"]
    with pytest.raises(ValueError, match="exists and was generated with other settings"):
        made("whole.jsonl", CorpusRequest("words", samples=2))
    assert made("whole.jsonl") == whole


@pytest.mark.parametrize(
    ("workdir", "given", "out", "words"),
    [
        ("", {}, "a.csv", "ends with .jsonl"),
        ("", {}, "a.jsonl", "--workdir of a run, or --model"),
        ("", {"model": "hf", "stage": 1}, "a.jsonl", "leave out --model or --stage"),
        ("nowhere", {}, "a.jsonl", "--workdir='nowhere' has no config.json"),
    ],
)
def test_wrong_requests_are_one_line(workdir, given, out, words):
    with pytest.raises(ValueError, match=words) as error:
        generate_corpus(None, workdir, CorpusRequest("words", 1, **given), out)
    assert "\n" not in str(error.value)
