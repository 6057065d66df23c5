"""What the end of a stage puts into a memory, and how a later stage reads it."""

import jax
import numpy as np
import pytest
from memory_helpers import stage_with_memory
from stage_fixtures import method_config

from cptjax.continual import stage_memory
from cptjax.data.device_batches import conversation_batch
from cptjax.data.mixture import RowRef
from cptjax.data.prompts import make_example_encoder
from cptjax.training.algorithms.continual_learning.hooks import MemorySettings
from cptjax.training.memory_batches import join_response

DER = dict(replay=dict(name="der", rows=6, tokens=8, batch=4, top_k=4))


def response(memory, slot):
    return memory["tokens"][slot, : memory["length"][slot]]


def test_gold_rows_are_stored_with_the_outputs_of_the_model(tmp_path):
    """The log-probabilities of stored tokens are those of the program that scores responses."""
    c = method_config("sft", stages=2, method=dict(replay=DER["replay"] | dict(top_k=150)))
    with stage_with_memory(c, tmp_path) as prepared, jax.set_mesh(prepared.run.model_ctx.mesh):
        run, memory, compared = prepared.run, prepared.ctx.memory.memory, 0
        sources, encode = stage_memory.stage_rows(run, run.stages[0], with_gold=True)
        assert memory["seen"] == 8 and set(memory["source"]) == {0}
        assert len(set(memory["row"])) == 6
        for slot, row in enumerate(memory["row"].tolist()):
            gold = encode(sources[0][row], row).encoded
            tokens = response(memory, slot)
            assert np.array_equal(tokens, gold.tokens[gold.loss_mask])
            batch = conversation_batch(run.model_ctx, [gold], rows=prepared.run.model_ctx.shards)
            logps = np.array(prepared.ctx.builder.score(prepared.params, batch))[0]
            for i, token in enumerate(tokens):
                ids, stored = memory["ids"][slot, i], memory["logps"][slot, i]
                assert np.exp(stored.astype(float)).sum() == pytest.approx(1, abs=2e-3)
                for at in np.flatnonzero(ids == token):
                    assert stored[at] == pytest.approx(logps[i], abs=4e-3)
                    compared += 1
        assert compared


def test_a_batch_of_the_memory_is_one_of_its_conversations(tmp_path):
    c = method_config("sft", stages=2, method=DER)
    c.tasks.first.template = ""
    c.data.update(template="direct", prompt_limit=128, buckets=(128,))
    c.stages = (c.stages[0] | {"data": {"template": "none"}}, c.stages[1])
    with stage_with_memory(c, tmp_path) as prepared:
        run, batches = prepared.run, prepared.ctx.memory
        memory = batches.memory
        used = []
        for update in range(3):
            (batch,), cost = batches.batches([update])
            slots = [ref.index for ref in batches.order.rows(update)]
            used += slots
            prompts = batches.read_prompts([RowRef(0, int(memory["row"][s])) for s in slots])
            whole = [
                join_response(p, response(memory, s)) for p, s in zip(prompts, slots, strict=True)
            ]
            assert cost.trained == sum(map(len, whole)) and cost.flops > 0
            for row, (slot, conversation) in enumerate(zip(slots, whole, strict=True)):
                n = memory["length"][slot]
                tokens = np.array(batch.prompts.tokens[row, : len(conversation)])
                assert np.array_equal(tokens, conversation.tokens)
                assert np.array_equal(np.array(batch.targets)[row, :n], response(memory, slot))
                assert np.array(batch.mask)[row].sum() == n
                for name in ("ids", "logps"):
                    found = np.array(batch.extra[f"memory_{name}"])[row, :n]
                    assert np.array_equal(found, memory[name][slot, :n])
        # Every row is used before one is used again.
        assert sorted(used[:6]) == list(range(6)) and sorted(used[6:]) == sorted(set(used[6:]))
        # Prompts are those that the row's own stage showed.
        example = run.datasets.examples("first", "train", run.stages[0].config)[0]
        (prompt,) = batches.read_prompts([RowRef(0, 0)])
        for stage, equal in zip(run.stages, (True, False), strict=True):
            task = {"first": run.datasets.prompted_task("first", stage.config)}
            other = make_example_encoder(run.model_ctx, task, False, 128)(example).encoded
            assert np.array_equal(other.tokens, prompt.tokens) == equal


def test_sampled_responses_are_those_of_the_policy_at_temperature_1(tmp_path):
    c = method_config("grpo", stages=2, method=DER, rollout=dict(temperature=0.5, top_k=1))
    sampling = stage_memory.memory_sampling(c, MemorySettings(6, 3, 0, 4))
    assert (sampling.temperature, sampling.top_k, sampling.group) == (1.0, 0, 1)
    assert sampling.max_new_tokens == 3
    c = method_config("grpo", stages=2, method=DER)
    with stage_with_memory(c, tmp_path) as prepared:
        run, method = prepared.run, prepared.programs
        memory, eos = prepared.ctx.memory.memory, run.model_ctx.cfg.eos
        for slot in range(6):
            tokens = response(memory, slot)
            assert 1 <= len(tokens) <= 4 and not set(tokens[:-1].tolist()) & set(eos)
            assert len(tokens) == 4 or tokens[-1] in eos
        assert len({tuple(response(memory, slot)) for slot in range(6)}) > 3
        # A second stage keeps most of the rows, whose responses stay, and counts on.
        method = stage_memory.build.memory_objective_from_config(c).method
        after, cost = stage_memory.add_stage_rows(
            run, run.stages[1], method, prepared.params, memory
        )
        old = after["source"] == 0
        assert after["seen"] == 16 and 0 < old.sum() < 6 and set(after["source"]) == {0, 1}
        assert np.array_equal(after["tokens"][old], memory["tokens"][old])
        assert np.array_equal(after["logps"][old], memory["logps"][old])
        assert set(memory["source"]) == {0} and cost.rollouts == 4  # a pass is one batch


def test_a_memory_that_does_not_fit_model_or_processes_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="der: top_k=32: expected less than the 32 tokens"):
        stage_memory.check_memory("der", MemorySettings(6, 8, 32, 4), vocab=32)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(ValueError, match="er: batch=4: expected a multiple of the 3 processes"):
        stage_memory.check_memory("er", MemorySettings(6, 8, 0, 4), vocab=32)
