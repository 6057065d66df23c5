"""The README's table of plans: its numbers, its cells, and the changes that make a run fit."""

import pytest
import readme_parts
import readme_plans

from cptjax.planning import programs

V5E_16 = ("Qwen2.5-VL-3B", "v5e-16")


def test_the_readme_shows_the_plans_of_the_json():
    _, written, _ = readme_parts.split_readme("plans")
    assert written == readme_plans.render_part(), "run python -m tests.readme_plans --write"


@pytest.mark.parametrize("method", readme_plans.METHODS)
def test_cells_of_a_method_have_the_same_batch_per_chip(method):
    per_chip = set()
    for place, (_, slices, chips) in readme_plans.SLICES.items():
        c = readme_plans.cell_config(V5E_16[0], place, method)
        per_chip.add(c.train.batch / chips)
        assert c.mesh.slices == c.mesh.data == slices
    assert len(per_chip) == 1


def test_the_dimensions_of_every_model_are_known():
    for model in readme_plans.MODELS:
        settings = readme_plans.cell_config(model, "v5e-16", "sft").model
        found = programs.planned_model_config(settings).text
        assert found.depth >= 28 and found.vocab > 100_000


def test_changes_are_made_one_after_the_other_until_all_programs_fit(monkeypatch):
    """The update fits with the smallest micro-batch, the rollouts with slots."""
    tried = []

    def plan_programs(config, devices, topology, slices, compiled):
        tried.append((config.train.micro_batch, config.rollout.slots, config.train.moments_dtype))
        if config.train.micro_batch == 0:
            return {"fits": False}, "train step"
        if config.rollout.slots == 0:
            return {"fits": False}, "rollouts"
        return {"fits": True}, ""

    pytest.importorskip("libtpu")
    monkeypatch.setattr(readme_plans, "plan_programs", plan_programs)
    cell = readme_plans.compile_cell(*V5E_16, "grpo")
    assert tried == [(0, 0, "float32"), (4, 0, "float32"), (4, 4, "float32")]
    assert cell == {"fits": True, "changes": ["smallest micro-batch", "slots"]}


def test_a_wider_model_axis_has_fewer_batch_shards():
    changes = (readme_plans.WIDER_MODEL, readme_plans.UPDATE_CHANGES[0])
    c = readme_plans.cell_config(*V5E_16, "grpo", changes)
    assert (c.mesh.model, c.train.micro_batch) == (8, 2)


def test_a_run_that_no_change_makes_fit_says_what_does_not(monkeypatch):
    refused = {"fits": False, "peak": 2.0**35, "program": "rollouts", "limit": 2.0**34}
    monkeypatch.setattr(readme_plans, "plan_programs", lambda *_: (dict(refused), "rollouts"))
    pytest.importorskip("libtpu")
    cell = readme_plans.compile_cell(*V5E_16, "grpo")
    changes = readme_plans.UPDATE_CHANGES + readme_plans.ROLLOUT_CHANGES
    assert sorted(cell["changes"]) == sorted(name for name, _ in changes)
    assert readme_plans.cell_text(cell) == "does not fit: rollouts 32.0 GiB"


def test_growth_compares_slices_with_the_same_settings():
    def cell(sent, *changes):
        return dict(fits=True, sent=sent, changes=list(changes))

    model = V5E_16[0]
    cells = {f"{model}, v5e-16, sft": cell(100.0), f"{model}, v5e-256, sft": cell(110.0)}
    cells |= {f"{model}, v6e-16, sft": cell(1.0, "LoRA"), f"{model}, v6e-256, sft": cell(3.0)}
    assert readme_plans.growth_text(cells, model, "sft") == "v5e x 1.10"


def test_cells_that_are_not_compiled_are_compiled_in_order():
    first = next(readme_plans.missing_cells({}))
    assert first == (*V5E_16, "sft")
    done = {readme_plans.cell_name(*c): {"fits": True} for c in readme_plans.missing_cells({})}
    assert not list(readme_plans.missing_cells(done))
    name, cell = "Qwen2.5-VL-72B, v6e-16, grpo", ("Qwen2.5-VL-72B", "v6e-16", "grpo")
    for refused in ({"fits": False, "changes": ["LoRA"]}, None):
        done[name] = refused
        assert list(readme_plans.missing_cells(done)) == [cell]
    done[name] = {"fits": False, "changes": ["mesh.model=8", "LoRA"]}
    assert not list(readme_plans.missing_cells(done))


def test_the_commits_of_the_cells_are_told():
    cells = {f"3B, {place}, {m}": {"commit": "a"} for place in "12" for m in readme_plans.METHODS}
    cells |= {"72B, 1, grpo": {"commit": "b"}, "72B, 2, grpo": {"commit": "b"}}
    assert readme_plans.commits_text(cells) == (
        "The cells were compiled at commit a; GRPO of 72B at b."
    )
