"""What a step learns from: ratios over several updates, KL in the reward, filters, windows of own answers, foreign corpora, replay."""

import dataclasses
import hashlib
import json

import jax
import numpy as np
import pytest
import stage_fixtures

from configs import base
from cptjax.common.files import read_jsonl
from cptjax.common.shuffle import permutation
from cptjax.continual import offline_filter, train_stage
from cptjax.continual.fisher import update_fisher
from cptjax.data.device_batches import conversation_batch
from cptjax.data.prompts import make_example_encoder
from cptjax.tasks import rewards
from cptjax.training import rollouts, self_training, train_loop
from cptjax.training.algorithms import losses
from cptjax.training.stage_context import StageProgress


def config(name: str, steps=2, stages=1, batch=4, **sections):
    c = base.get_config()
    c.stages = tuple(dict(task=task, steps=steps) for task in ("first", "second")[:stages])
    c.method.update(base.METHODS[name])
    c = stage_fixtures.tiny(c, steps=steps, stages=stages, batch=batch)
    for section, values in sections.items():
        c[section].update(values)
    return c


def rolled(desk, key=None, **changes) -> rollouts.GradedRollouts:
    """Answers of the desk's policy to the first batch."""
    key = desk.ctx.step_key(0) if key is None else key
    with desk.ctx.open_stream(0) as stream:
        return rollouts.sample_rollouts(
            dataclasses.replace(desk.ctx.builder, **changes), desk.params, next(stream), key, 0
        )


# ---- rollouts ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    method = dict(advantage="reinforce", ratio="token", updates_per_batch=2, passes=2, kl_coef=0.0)
    with stage_fixtures.desk(
        config("grpo", method=method), tmp_path_factory.mktemp("desk")
    ) as desk:
        yield desk


def test_each_pass_goes_over_all_groups_and_only_stale_ones_have_a_ratio(desk):
    graded = rolled(desk)
    found = rollouts.rollout_step_batch(desk.ctx.builder, desk.params, graded, None, 0, 1)
    state, metrics, rows = desk.state, [], []
    for update in found.updates:
        state, numbers = dataclasses.replace(desk, state=state).update(update, lr=3e-2)
        metrics.append(numbers)
        rows.append(np.concatenate([np.asarray(b.targets) for b in update]))
    assert len(metrics) == 4
    np.testing.assert_array_equal(np.concatenate(rows[:2]), np.concatenate(rows[2:]))
    np.testing.assert_array_equal(
        np.concatenate(rows[:2]), graded.samples.tokens[:, : rows[0].shape[1]]
    )
    assert (
        abs(metrics[0]["ratio_min"] - 1) < 1e-5
        and abs(metrics[0]["ratio_max"] - 1) < 1e-5
        and metrics[0]["clip_high"] == 0
    )
    assert all(n["ratio_max"] - n["ratio_min"] > 1e-3 for n in metrics[2:])
    assert metrics[0]["mismatch_max"] < 1e-5


def test_rollout_rows_hold_what_another_run_needs(desk):
    graded = rolled(desk)
    found = rollouts.rollout_step_batch(desk.ctx.builder, desk.params, graded, None, 3, 1)
    row = found.rollout_rows[0]
    assert (row["step"], row["stage"], row["task"]) == (3, 1, "first") and row["id"].startswith(
        "first/train/"
    )
    assert len(found.rollout_rows) == 8 == found.cost.rollouts and 8 <= found.cost.tokens <= 32
    assert found.cost.trained == 2 * (
        sum(len(i.encoded) for i in graded.items) + found.cost.tokens
    )  # two passes
    assert json.loads(json.dumps(row)) == row


def test_kl_goes_into_the_reward_at_the_sampled_tokens(tmp_path):
    method = dict(
        kl_place="reward",
        kl_coef=0.5,
        kl_estimator="k1",
        advantage="reinforce",
        updates_per_batch=1,
    )
    with stage_fixtures.desk(config("grpo", method=method), tmp_path) as desk:
        t, graded = desk.ctx.builder, rolled(desk)
        found = rollouts.rollout_step_batch(t, desk.params, graded, desk.ctx.reference, 0, 1)
        assert found.metrics["kl"] == pytest.approx(0, abs=1e-6)
        assert found.metrics["reward/shaped"] == pytest.approx(found.metrics["reward"], abs=1e-5)
        moved = jax.tree.map(lambda x: x * 1.5, desk.params)
        found = rollouts.rollout_step_batch(t, desk.params, graded, moved, 0, 1)
        (batch,) = next(found.updates)
        own, ref = np.asarray(t.score(desk.params, batch)), np.asarray(t.score(moved, batch))
        want = graded.rewards.reshape(-1) - 0.5 * np.where(batch.mask, own - ref, 0).sum(1)
        np.testing.assert_allclose(batch.extra["advantages"], want, atol=1e-4)
        assert abs(found.metrics["kl"]) > 1e-4 and "ref_logps" not in batch.extra


def test_cut_distribution_is_weighed_back(tmp_path):
    """With top_p < 1 the sampler's distribution is sharper than the policy: weights policy / sampler lie below 1, as drawn."""
    c = config("grpo", method=dict(tis_cap=2.0, kl_coef=0.0), rollout=dict(top_p=0.5))
    with stage_fixtures.desk(c, tmp_path) as desk:
        graded = rolled(desk)
        (batch,) = next(
            rollouts.rollout_step_batch(desk.ctx.builder, desk.params, graded, None, 0, 1).updates
        )
        mask = np.asarray(batch.mask)
        weight = np.asarray(
            losses.tis_weights(
                batch.extra["sampler_logps"], batch.extra["behaviour_logps"], batch.mask, 2.0
            )
        )
        assert (weight[mask] < 0.6).all() and (
            weight[mask] > 0.4
        ).all()  # the nucleus holds about half of the mass
        _, metrics = desk.update([batch])
        assert metrics["mismatch_max"] < 1e-5  # the policy itself is what the trainer computes


def test_remax_compares_with_one_greedy_answer(tmp_path):
    with stage_fixtures.desk(config("remax", method=dict(kl_coef=0.0)), tmp_path) as desk:
        graded = rolled(desk)
        assert graded.greedy_rewards.shape == (4,) and graded.cost.rollouts == 8 + 4
        (batch,) = next(
            rollouts.rollout_step_batch(desk.ctx.builder, desk.params, graded, None, 0, 1).updates
        )
        want = graded.rewards - graded.greedy_rewards[:, None]
        np.testing.assert_allclose(
            np.asarray(batch.extra["advantages"]).reshape(4, 2), want, atol=1e-6
        )


def test_tasks_with_their_own_rewards_share_a_batch(desk):
    items = rolled(desk).items
    prompted_tasks = desk.ctx.builder.prompted_tasks
    other = [
        dataclasses.replace(i, example=dataclasses.replace(i.example, task="other"))
        for i in items[::2]
    ]
    mixed = [x for pair in zip(items[1::2], other, strict=True) for x in pair]

    @dataclasses.dataclass
    class Constant:
        def rewards(self, texts, examples):
            assert {e.task for e in examples} == {"other"}
            return [{"reward": 7.0} for _ in texts]

    builder = dataclasses.replace(
        desk.ctx.builder, prompted_tasks=prompted_tasks | {"other": Constant()}
    )
    parts = rollouts.grade_responses(builder, mixed, [f"answer {i}" for i in range(8)])
    assert [p["reward"] == 7.0 for p in parts] == [False, False, True, True] * 2


def test_spread_over_updates_keeps_extremes():
    metrics = [
        {"ratio_min": 0.9, "ratio_max": 1.0, "loss": 1.0},
        {"ratio_min": 0.95, "ratio_max": 1.4, "loss": 3.0},
    ]
    assert train_loop.merge_update_metrics(metrics) == {
        "ratio_min": 0.9,
        "ratio_max": 1.4,
        "loss": 2.0,
    }


@pytest.mark.parametrize(("gap", "warned"), [(0.0, False), (0.2, True)])
def test_sampler_that_is_not_the_trainer_is_told(desk, capsys, gap, warned):
    train_loop.warn_of_mismatch({"mismatch": gap, "mismatch_max": 2 * gap}, desk.ctx)
    said = capsys.readouterr()
    assert ("log-probabilities differ" in said.out + said.err) == warned


# ---- online filter -------------------------------------------------------------------------------------------------------


def test_online_filter_refills_with_mixed_groups_and_says_how_far_it_read(tmp_path):
    c = config("dapo", method=dict(online_filter=dict(lo=0.0, hi=1.0, max_refills=30), overlong=0))
    with stage_fixtures.desk(c, tmp_path) as desk, desk.ctx.open_stream(0) as stream:
        graded, info, turns = rollouts.sample_filtered_rollouts(
            desk.ctx.builder, desk.params, stream, desk.ctx.step_key(0), 0
        )
        assert (
            len(graded.items) == 4
            and graded.samples.tokens.shape[0] == 8
            and turns == info["filter/batches"] == stream.step
        )
        assert (np.ptp(graded.accuracy, 1) == 1).all()
        assert graded.cost.rollouts == 8 * turns  # answers thrown away were paid for
        again = rolled(desk, jax.random.fold_in(desk.ctx.step_key(0), 0))
        keep = [r for q in np.flatnonzero(np.ptp(again.accuracy, 1)) for r in (2 * q, 2 * q + 1)]
        assert graded.samples.texts[: len(keep)] == [again.samples.texts[r] for r in keep]


def test_online_filter_stops_when_nothing_is_left(tmp_path):
    c = config("dapo", method=dict(online_filter=dict(lo=0.0, hi=1.0, max_refills=2), overlong=0))
    c.tasks["first"].scorer = lambda prediction, answer, meta=None: 0.0
    with stage_fixtures.desk(c, tmp_path) as desk, desk.ctx.open_stream(0) as stream:
        with pytest.raises(ValueError, match="after 3 batches of 4 prompts only 0 of 4 groups"):
            rollouts.sample_filtered_rollouts(
                desk.ctx.builder, desk.params, stream, desk.ctx.step_key(0), 0
            )


def test_a_lesson_tells_how_many_batches_it_took(tmp_path):
    c = config("dapo", method=dict(online_filter=dict(lo=0.0, hi=1.0, max_refills=30), overlong=0))
    with stage_fixtures.desk(c, tmp_path) as desk:
        with desk.ctx.open_stream(0) as stream:
            found = [
                train_loop.next_step_batch(desk.ctx, desk.params, stream, StageProgress())
                for _ in range(2)
            ]
            assert stream.step == sum(f.batches_taken for f in found) and [
                f.batches_taken for f in found
            ] == [f.metrics["filter/batches"] for f in found]


# ---- offline filter ------------------------------------------------------------------------------------------------------


def test_offline_filter_and_its_blind_control_keep_equally_many(tmp_path):
    kept = {}
    for name in ("incompetent", "zero_variance", "random"):
        c = config(
            "grpo", method=dict(filter=dict(name=name, samples=2), kl_coef=0.0), data=dict(limit=16)
        )
        _, _, lines = stage_fixtures.train_all_stages(c, tmp_path / name)
        found = read_jsonl(tmp_path / name / "filters" / "stage1_first.jsonl")
        counts = np.array([r["correct"] for r in found])
        (metrics,) = [line for line in lines if line.get("event") == "filter"]
        assert len(counts) == 16 and metrics["rollouts"] == 32 and metrics["flops"] > 0
        assert (metrics["filter/never"], metrics["filter/always"]) == (
            (counts == 0).mean(),
            (counts == 2).mean(),
        )
        kept[name] = metrics["filter/rows"]
        assert [r["kept"] for r in found] == (counts >= 1).tolist() or name != "incompetent"
        assert sum(r["kept"] for r in found) == kept[name] == 16 * metrics["filter/kept"]
        rows = {r["id"] for r in read_jsonl(tmp_path / name / "rollouts" / "stage1.jsonl")}
        good = {"incompetent": counts >= 1, "zero_variance": counts == 1}.get(
            name, np.ones(16, bool)
        )
        assert rows <= {f"first/train/{i}" for i in np.flatnonzero(good)}
        assert kept[name] == (good.sum() if name != "random" else kept["incompetent"])
    assert 0 < kept["zero_variance"] < kept["incompetent"] == kept["random"] < 16


def test_control_of_another_run_keeps_as_many_and_draws_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(
        offline_filter, "count_correct", lambda *_: pytest.fail("answers were drawn")
    )
    theirs = tmp_path / "theirs" / "filters" / "stage1_first.jsonl"
    theirs.parent.mkdir(parents=True)
    theirs.write_text(
        "".join(
            json.dumps({"row": i, "id": f"first/train/{i}", "kept": i < 3}) + "\n" for i in range(8)
        )
    )

    def ids(like, limit=8):
        control = dict(filter=dict(name="random", like=str(tmp_path / like)), kl_coef=0.0)
        with stage_fixtures.desk(
            config("grpo", method=control, data=dict(limit=limit)), tmp_path / f"{like}{limit}"
        ) as desk:
            return [e.id for e in desk.ctx.sources[0]]

    found = ids("theirs")
    rows = read_jsonl(tmp_path / "theirs8" / "filters" / "stage1_first.jsonl")
    assert (
        [r["id"] for r in rows if r["kept"]] == found
        and len(rows) == 8
        and "correct" not in rows[0]
    )
    assert len(found) == 3 and found != [f"first/train/{i}" for i in range(3)]
    for like, limit, said in (
        ("theirs", 6, "expected the 6 prompts .*, got 8 prompts"),
        ("none", 8, "expected the 8 prompts .*, got a missing or empty file"),
    ):
        with pytest.raises(ValueError, match=said):
            ids(like, limit)


def test_filter_is_counted_once(tmp_path, monkeypatch):
    c = config("grpo", method=dict(filter=dict(name="incompetent", samples=2), kl_coef=0.0))
    with stage_fixtures.desk(c, tmp_path) as desk:
        monkeypatch.setattr(
            offline_filter, "count_correct", lambda *_: pytest.fail("counted again")
        )
        again = train_stage.make_stage_context(desk.run, desk.ctx.stage, desk.params, None)
        assert [e.id for e in again.sources[0]] == [e.id for e in desk.ctx.sources[0]]


# ---- own and others' answers ---------------------------------------------------------------------------------------------


def test_windows_of_own_answers_follow_the_policy_and_are_read_back(tmp_path):
    with stage_fixtures.desk(
        config("iterative_sft", steps=4, method=dict(refresh="2")), tmp_path
    ) as desk:
        ctx, params = desk.ctx, desk.params
        draw = lambda step, params=params: self_training.response_examples(ctx, params, step)
        first, spent = draw(0)
        assert (
            len(first) == 4 and spent.rollouts == 64
        )  # two steps of four prompts, eight answers each
        texts = {(i.row, bytes(i.encoded.tokens)) for i in first}
        assert draw(1)[1].rollouts == 0  # the same window
        moved = jax.tree.map(lambda x: x * 1.5, params)
        assert {
            (i.row, bytes(i.encoded.tokens)) for i in draw(0, moved)[0]
        } == texts  # a resumed run reads what was written
        draw(2, moved)
        files = {p.name: read_jsonl(p) for p in (tmp_path / "corpus").glob("*.jsonl")}
        assert set(files) == {"stage1_step0.jsonl", "stage1_step2.jsonl"}
        origin = json.loads((tmp_path / "corpus" / "stage1_step2.source.json").read_text())
        assert origin == {
            "policy": {"stage": 1, "step": 2},
            "answers": len(files["stage1_step2.jsonl"]),
        }
        for start, rows in ((0, files["stage1_step0.jsonl"]), (2, files["stage1_step2.jsonl"])):
            seen = {p.index for step in (start, start + 1) for p in ctx.mixture.rows(step)}
            assert {r["row"] for r in rows} <= seen
            graded = ctx.builder.prompted_tasks["first"].compute_rewards(
                [r["response"] for r in rows], [ctx.sources[0][r["row"]] for r in rows]
            )
            assert all(rewards.is_correct(parts) for parts in graded)


def test_own_answers_learned_are_prompt_and_answer(tmp_path):
    with stage_fixtures.desk(config("self_sft", steps=1), tmp_path) as desk:
        items, _ = self_training.response_examples(desk.ctx, desk.params, 0)
        rows = {
            (r["row"], r["response"])
            for r in read_jsonl(tmp_path / "corpus" / "stage1_step0.jsonl")
        }
        decode = desk.run.model_ctx.processor.decode
        for item in items:
            answer = decode([[int(t) for t in item.encoded.tokens[item.encoded.loss_mask]]])[0]
            assert any(row == item.row and answer.startswith(text.strip()) for row, text in rows)


def foreign(tmp_path, rows, **method):
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return config(
        "corpus_sft",
        steps=1,
        batch=2,
        method=dict(corpus=str(path), **method),
        data=dict(prompt_limit=128, buckets=(128,)),
    )


def learned_texts(c, folder):
    with stage_fixtures.desk(c, folder) as desk:
        self_training.response_examples(desk.ctx, desk.params, 0)
    return {(r["id"], r["response"]) for r in read_jsonl(folder / "corpus" / "stage1_step0.jsonl")}


def test_corpus_gives_its_correct_answers_and_grades_what_is_not(tmp_path):
    right = next(w for w in ("a", "b", "c", "d", "e") if stage_fixtures.coin(w, None) == 1)
    wrong = next(w for w in ("a", "b", "c", "d", "e") if stage_fixtures.coin(w, None) == 0)
    rows = [
        {"id": "first/train/0", "response": "kept", "rewards": {"reward": 0.9, "accuracy": 1.0}},
        {"id": "first/train/1", "response": "dropped", "rewards": {"reward": 0.1, "accuracy": 0.0}},
        {"id": "first/train/2", "response": "whole", "reward": 1.0},
        {"id": "first/train/3", "response": right},  # no reward: the task's own says
        {"id": "first/train/3", "response": wrong},
        {
            "id": "first/train/4",
            "response": "cut",
            "reward": 1.0,
            "finished": False,
        },  # it met its length limit
        {"id": "first/train/4", "response": "uncut", "reward": 1.0, "finished": True},
    ]
    want = {
        ("first/train/0", "kept"),
        ("first/train/2", "whole"),
        ("first/train/3", right),
        ("first/train/4", "uncut"),
    }
    assert learned_texts(foreign(tmp_path, rows), tmp_path / "run") == want
    origin = json.loads((tmp_path / "run" / "corpus" / "stage1_step0.source.json").read_text())
    path = tmp_path / "other.jsonl"
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert origin == {"corpus": str(path), "sha256": sha256, "rows": 7, "answers": 4}


def test_answers_have_room_beside_the_prompt_limit(tmp_path):
    """Rows of prompt and answer may be longer than prompts by an answer, and their lengths are still one of a few buckets."""
    c = foreign(
        tmp_path,
        [
            {"id": f"first/train/{i}", "response": "it is " * 14 + "red", "reward": 1.0}
            for i in range(4)
        ],
    )
    c.data.update(prompt_limit=32, buckets=(16, 32))
    c.rollout.max_new_tokens = 31
    with stage_fixtures.desk(c, tmp_path / "run") as desk:
        items, _ = self_training.response_examples(desk.ctx, desk.params, 0)
        assert all(32 < len(i.encoded) < 64 for i in items)
        ((batch,),) = desk.ctx.builder.conversation_batches(items)
        assert batch.prompts.tokens.shape[1] == 64 and desk.ctx.builder.model_ctx.buckets == (
            16,
            32,
        )
    c.rollout.max_new_tokens = 4
    with pytest.raises(
        ValueError,
        match=r"other.jsonl': first/train/0 with its answer has \d+ tokens, over the 37 of a prompt",
    ):
        learned_texts(c, tmp_path / "short")


def test_corpus_with_the_correct_answer_put_in(tmp_path):
    rows = [
        {
            "id": "first/train/0",
            "response": "<think>well</think><answer>wrong</answer>",
            "rewards": {"accuracy": 0.0},
        },
        {"id": "first/train/1", "response": "no answer", "rewards": {"accuracy": 0.0}},
    ]
    c = foreign(tmp_path, rows, corpus_answer="gold")
    c.tasks["first"].template = "answer"
    c.data.update(prompt_limit=256, buckets=(256,))
    with stage_fixtures.desk(c, tmp_path / "run") as desk:
        gold = [desk.ctx.sources[0][i].answer for i in (0, 1)]
    put_in = (
        f"<think>well</think><answer>{gold[0]}</answer>",
        f"no answer\n<answer>{gold[1]}</answer>",
    )
    want = {(f"first/train/{i}", text) for i, text in enumerate(put_in)}
    assert learned_texts(c, tmp_path / "run") == want
    with pytest.raises(ValueError, match="needs a boxed or tagged answer"):
        learned_texts(foreign(tmp_path, rows, corpus_answer="gold"), tmp_path / "plain")


BAD = {
    "empty": ([], "no lines"),
    "other keys": ([{"prompt": "a"}], "the keys prompt"),
    "unknown row": (
        [{"id": "second/train/0", "response": "a", "reward": 1.0}],
        "1 of its ids are not in the stage's data",
    ),
    "none right": (
        [{"id": "first/train/0", "response": "a", "reward": 0.0}],
        "none of its 1 answers is correct",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_corpus_that_can_not_be_used_is_one_line(name, tmp_path):
    rows, expected = BAD[name]
    with pytest.raises(ValueError) as error:
        learned_texts(foreign(tmp_path, rows), tmp_path / "run")
    assert expected in str(error.value) and "\n" not in str(error.value)


# ---- earlier stages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "kind"), [("sft", "gold"), ("grpo", "prompts"), ("self_sft", "prompts")]
)
def test_replay_is_counted(method, kind, tmp_path):
    c = config(
        method,
        steps=4,
        stages=2,
        batch=8,
        method=dict(replay=dict(fraction=0.25, kind=kind), kl_coef=0.0),
    )
    with stage_fixtures.desk(c, tmp_path, number=2) as desk:
        assert list(desk.ctx.builder.prompted_tasks) == ["second", "first"]
        tasks = []
        with desk.ctx.open_stream(0) as stream:
            for step in range(4):
                items = (
                    next(stream)
                    if method != "self_sft"
                    else self_training.response_examples(desk.ctx, desk.params, step)[0]
                )
                tasks += [i.example.task for i in items]
        assert [tasks[i : i + 8].count("first") for i in range(0, 32, 8)] == [
            2
        ] * 4  # a quarter of each step's rows


def test_first_stage_has_nothing_to_replay(tmp_path):
    c = config("sft", stages=2, method=dict(replay=dict(fraction=0.25, kind="gold")))
    with stage_fixtures.desk(c, tmp_path) as desk:
        assert (
            list(desk.ctx.builder.prompted_tasks) == ["first"] and desk.ctx.mixture.own_share == 1
        )


def test_penalties_and_averages_hold_a_stage_near_its_start(tmp_path):
    distance = {}
    start = None
    cases = {
        "none": {},
        "l2": dict(penalty=dict(name="l2", coef=100.0, samples=0)),
        "wise": dict(average=0.75),
    }
    for name, method in cases.items():
        c = config("sft", steps=6, method=method, train=dict(lr=1e-2, weight_decay=0.0))
        with stage_fixtures.opened(c, tmp_path / name) as (run, model_state):
            start = jax.device_get(model_state.params)
            model_state = train_stage.train_stage(run, run.stages[0], model_state)
            gaps = jax.tree.map(
                lambda a, b: float(np.square(a - b).sum()),
                start,
                jax.device_get(model_state.params),
            )
            distance[name] = np.sqrt(sum(jax.tree.leaves(gaps)))
    assert distance["wise"] == pytest.approx(0.25 * distance["none"], rel=1e-3)
    assert distance["l2"] < 0.8 * distance["none"]


def test_fisher_is_the_mean_of_single_squares_and_holds_the_next_stage(tmp_path):
    c = config(
        "sft",
        steps=1,
        stages=2,
        method=dict(penalty=dict(name="ewc", coef=1e4, samples=2)),
        train=dict(lr=1e-2),
    )
    with stage_fixtures.desk(c, tmp_path) as desk:
        fisher, cost = jax.device_get(
            update_fisher(desk.run, desk.run.stages[0], desk.state.params, desk.frozen, None)
        )
        squares = None
        build = make_example_encoder(desk.run.model_ctx, desk.ctx.builder.prompted_tasks, True, 32)
        drawn = permutation(8, (0, 1, 0))[:2].tolist()
        assert drawn != [0, 1]
        for i in drawn:
            one = conversation_batch(
                desk.run.model_ctx, [build(desk.ctx.sources[0][i]).encoded], rows=1
            )
            gradient = jax.device_get(
                desk.steps.begin(desk.state.params, desk.frozen, one).gradient
            )
            square = jax.tree.map(lambda g: np.square(g) / 2, gradient)
            squares = square if squares is None else jax.tree.map(np.add, squares, square)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7), fisher, squares
    )
    _, _, lines = stage_fixtures.train_all_stages(c, tmp_path / "run")
    steps = [line for line in lines if "event" not in line]
    spent = [line["flops"] for line in lines if line.get("event") == "fisher"]
    assert len(spent) == 2 and spent[0] == cost.flops > 0
    assert "penalty" not in steps[0] and steps[1]["penalty"] == pytest.approx(
        0, abs=1e-9
    )  # it starts at the anchor
