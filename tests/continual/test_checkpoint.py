"""Checkpoints are restored bit for bit on any mesh, and a damaged one is skipped and set aside."""

import gc
import random
import shutil
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stage_fixtures
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.serialization import serialization

from configs import base
from cptjax import sharding
from cptjax.continual import checkpoint
from cptjax.continual.checkpoint import CheckpointDamaged, Checkpoints, RunRefused, StateLost

DEVICES = jax.devices()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(checkpoint, "RETRY_SECONDS", (0.0, 0.0))


def placed(x, devices: int):
    mesh = sharding.make_mesh(1, -1, 1, DEVICES[:devices])
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec("fsdp")))


def like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def tree(seed: int = 0, devices: int = 1):
    rng = np.random.default_rng(seed)
    w = placed(rng.normal(size=(16, 3)).astype(np.float32), devices)
    return {"a": {"w": w}, "n": placed(np.arange(8, dtype=np.int32) + seed, devices)}


def equal(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture
def saved(tmp_path):
    """Stage 1 with steps 2 and 4 and its end at 5; stage 2 with step 2. Seeds identify trees."""
    kept = Checkpoints(tmp_path / "c", keep=3)
    for kind, stage, step, seed in (
        ("steps", 1, 2, 12),
        ("steps", 1, 4, 14),
        ("stages", 1, 5, 15),
        ("steps", 2, 2, 22),
    ):
        kept.save(kind, stage, step, {"params": tree(seed)}, {"seed": seed})
    kept.wait()
    yield kept
    kept.close()


def reader(kept: Checkpoints):
    return lambda kind, stage, step: (
        kept.progress(kind, stage, step)["seed"],
        kept.restore(kind, stage, step, {"params": like(tree())})["params"],
    )


def damage(kept: Checkpoints, kind: str, number: int, how: str = "truncate") -> None:
    folder = kept.folder / kind / str(number)
    if how == "empty":
        shutil.rmtree(folder / "params")
        return
    for path in (p for p in folder.rglob("*") if p.is_file()):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_checkpoints_are_listed_newest_first(saved):
    assert saved.found() == [(2, 2, "steps"), (1, 5, "stages"), (1, 4, "steps"), (1, 2, "steps")]
    seed, found = saved.newest(reader(saved))
    assert seed == 22 and equal(found, tree(22))
    assert saved.stage_end(1) == 5
    with pytest.raises(ValueError, match=r"no finished stage 2; finished stages: \[1\]"):
        saved.stage_end(2)


@pytest.mark.parametrize("before, after", [(8, 1), (1, 8), (8, 4)])
def test_a_checkpoint_is_restored_on_any_device_count(tmp_path, before, after):
    kept = Checkpoints(tmp_path, async_save=False)
    kept.save("stages", 1, 3, {"params": tree(5, before)}, {})
    found = kept.restore("stages", 1, 3, {"params": like(tree(0, after))})["params"]
    assert equal(found, tree(5)) and len(found["n"].sharding.device_set) == after
    kept.close()


def test_one_tree_of_a_checkpoint_is_restored_alone(tmp_path):
    kept = Checkpoints(tmp_path, async_save=False)
    kept.save("stages", 1, 3, {"params": tree(1), "opt_state": tree(2), "fisher": tree(3)}, {})
    assert kept.restore("stages", 1, 3, {"params": like(tree())}).keys() == {"params"}
    assert equal(kept.restore("stages", 1, 3, {"fisher": like(tree())})["fisher"], tree(3))
    kept.close()


@pytest.mark.parametrize("how", ["truncate", "empty"])
def test_a_damaged_newest_checkpoint_is_skipped_and_its_step_can_be_saved_again(saved, how, capsys):
    damage(saved, "steps", 2 * 10**6 + 2, how)
    seed, found = saved.newest(reader(saved))
    assert seed == 15 and equal(found, tree(15))
    assert "warning: checkpoint steps of stage 2, step 2 cannot be read" in capsys.readouterr().err
    assert (saved.folder / "damaged" / "steps-stage2-step2").is_dir() and saved.found()[0] == (
        1,
        5,
        "stages",
    )
    saved.save("steps", 2, 2, {"params": tree(99)}, {"seed": 99})
    saved.wait()
    assert saved.newest(reader(saved))[0] == 99


def test_a_damaged_end_of_a_stage_is_refused_unless_stages_may_be_repeated(saved):
    for kind, number in (("steps", 2 * 10**6 + 2), ("stages", 10**6 + 5)):
        damage(saved, kind, number)
    with pytest.raises(StateLost, match="stages of stage 1, step 5 .*/stages/1000005.* is dam"):
        saved.newest(reader(saved))
    assert len(saved.found()) == 4  # all are still in place
    assert saved.newest(reader(saved), repeat_stages=True)[0] == 14
    assert saved.found() == [(1, 4, "steps"), (1, 2, "steps")]
    assert saved.newest_name() == (2, 2, "steps")  # in damaged/, which is not lost


def test_a_lost_stage_is_refused_instead_of_trained_again(saved):
    for kind, number in (
        ("steps", 10**6 + 2),
        ("steps", 10**6 + 4),
        ("stages", 10**6 + 5),
        ("steps", 2 * 10**6 + 2),
    ):
        damage(saved, kind, number)
    with pytest.raises(StateLost, match="stages of stage 1, step 5"):
        saved.newest(reader(saved))
    assert len(saved.found()) == 4  # all are still in place
    assert saved.newest(reader(saved), repeat_stages=True) is None and saved.found() == []


def test_every_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    """60 single bits, by the sizes of the files. Without checksums, 59 were restored silently."""
    x = {"w": placed(np.random.default_rng(0).normal(size=(64, 300)).astype(np.float32), 2)}
    kept = Checkpoints(tmp_path / "c", async_save=False)
    kept.save("stages", 1, 3, {"params": x}, {})
    kept.close()
    paths = [p for p in (tmp_path / "c" / "stages").rglob("*") if p.is_file()]
    rng, noticed = random.Random(0), 0
    for path in rng.choices(paths, [p.stat().st_size for p in paths], k=60):
        before, data = path.read_bytes(), bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        again = Checkpoints(tmp_path / "c", async_save=False)
        try:
            assert equal(again.restore("stages", 1, 3, {"params": like(x)})["params"], x)
        except CheckpointDamaged:
            noticed += 1
        again.close()
        path.write_bytes(before)
    assert noticed > 50


def test_a_changed_record_is_noticed(tmp_path):
    kept = Checkpoints(tmp_path, async_save=False)
    kept.save("stages", 1, 3, {"params": tree()}, {"positions": {"evals.csv": 1234}})
    path = kept.path("stages", 1, 3) / "progress" / "metadata"
    path.write_text(path.read_text().replace("1234", "1235"))
    with pytest.raises(CheckpointDamaged, match="its record does not match its hash"):
        kept.progress("stages", 1, 3)
    kept.close()


@pytest.mark.parametrize("failures", [1, 99])
def test_a_read_error_is_tried_again_and_then_stops_the_run(saved, monkeypatch, capsys, failures):
    """It is not damage: everything stays in place."""
    find_handler, calls = checkpoint._handler, []

    def failing(arg):
        calls.append(arg)
        if len(calls) <= failures:
            raise OSError(5, "Input/output error")
        return find_handler(arg)

    monkeypatch.setattr(checkpoint, "_handler", failing)
    if failures == 1:
        assert saved.newest(reader(saved))[0] == 22
    else:
        with pytest.raises(OSError, match="/steps/2000002 cannot be read .*Input/output error"):
            saved.newest(reader(saved))
        assert len(calls) == 3
    assert "steps/2000002: [Errno 5] Input/output error; reading again" in capsys.readouterr().err
    assert len(saved.found()) == 4 and not (saved.folder / "damaged").exists()


def test_an_array_that_cannot_be_read_is_told_from_one_that_is_gone(saved, monkeypatch, capsys):
    """Orbax says only which part of an array it read; the array store says why that failed."""
    folder = saved.path("stages", 1, 5)
    arrays = folder / "params" / "d"
    arrays.rename(folder / "elsewhere")
    with pytest.raises(
        CheckpointDamaged,
        match=f'{folder} is damaged: a file is missing: .*"params/d/.*; bring back',
    ):
        saved.restore("stages", 1, 5, {"params": like(tree())})
    (folder / "elsewhere").rename(arrays)

    async def fail(**_):
        raise ValueError("INTERNAL: Error reading local file: OS error 5: EIO Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(serialization, "_read_shard", fail)
        with pytest.raises(OSError, match=f"{folder} cannot be read .*EIO Input/output error"):
            saved.restore("stages", 1, 5, {"params": like(tree())})
    assert equal(saved.restore("stages", 1, 5, {"params": like(tree())})["params"], tree(15))
    gc.collect()
    assert "Traceback" not in capsys.readouterr().err


def test_a_checkpoint_of_an_older_version_is_read_with_a_warning(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "describe_arrays", checkpoint.tree_shapes)
        patched.setattr(checkpoint.files, "add_hash", dict)
        kept = Checkpoints(tmp_path, async_save=False)
        kept.save("stages", 1, 3, {"params": tree(1)}, {})
    assert equal(kept.restore("stages", 1, 3, {"params": like(tree())})["params"], tree(1))
    assert "of an older version, without checksums: unverified" in capsys.readouterr().err
    kept.close()


def test_arrays_are_verified_before_they_are_cast(tmp_path):
    kept = Checkpoints(tmp_path, async_save=False)
    kept.save("stages", 1, 3, {"params": {"x": placed(np.float32([0, 1, 2**-20, 3]), 1)}}, {})
    half = {"x": jax.ShapeDtypeStruct((4,), jnp.bfloat16, sharding=tree()["n"].sharding)}
    found = kept.restore("stages", 1, 3, {"params": half})["params"]["x"]
    assert found.dtype == jnp.bfloat16 and np.array_equal(found, [0, 1, 2**-20, 3])
    kept.close()


def test_what_is_on_disk_is_reported_and_steps_of_ended_stages_are_removed(tmp_path):
    names: list = []
    kept = Checkpoints(tmp_path, on_saved=lambda *name: names.append(name))
    kept.save("steps", 1, 2, {"params": tree()}, {})
    assert names == []  # not known to be complete
    kept.save("stages", 1, 4, {"params": tree()}, {})
    assert names == [(1, 2, "steps")]
    kept.wait()
    assert names == [(1, 2, "steps"), (1, 4, "stages")]
    kept.save("steps", 2, 2, {"params": tree()}, {})
    kept.wait()
    kept.remove_steps(1)
    assert kept.found() == [(2, 2, "steps"), (1, 4, "stages")]
    kept.move_all(tmp_path / "old")
    assert kept.found() == [] and (tmp_path / "old" / "stages" / str(10**6 + 4)).is_dir()
    kept.close()


def test_damage_inside_the_first_stage_starts_the_run_again(tmp_path):
    kept = Checkpoints(tmp_path, async_save=False)
    kept.save("steps", 1, 2, {"params": tree()}, {"seed": 0})
    damage(kept, "steps", 10**6 + 2)
    assert kept.newest(reader(kept)) is None and kept.found() == []
    kept.close()


def test_a_number_of_an_older_version_is_refused_with_the_new_one(tmp_path):
    (tmp_path / "stages" / "3000000007").mkdir(parents=True)
    with pytest.raises(RunRefused, match="stages/3000000007 has .*; rename it to 3000007, and the"):
        Checkpoints(tmp_path)


def test_a_refusal_or_lack_of_memory_is_not_damage(saved):
    for error in (
        RunRefused("another config"),
        MemoryError(),
        RuntimeError("RESOURCE_EXHAUSTED: out of memory"),
        KeyError("our mistake"),
    ):

        def read(*_, error=error):
            raise error

        with pytest.raises(type(error)):
            saved.newest(read)
    assert len(saved.found()) == 4


@pytest.mark.parametrize("how", ["shape", "name", "tree", "permission"])
def test_a_checkpoint_that_does_not_fit_is_refused_and_kept(saved, how, monkeypatch):
    """A changed model or optimizer, or a folder without read permission, is not damage."""
    other = like(tree())
    if how == "shape":
        other["a"]["w"] = jax.ShapeDtypeStruct(
            (16, 4), np.float32, sharding=other["a"]["w"].sharding
        )
    elif how == "name":
        other["b"] = other.pop("a")
    elif how == "permission":
        refused = ValueError("PERMISSION_DENIED: Error opening file")
        monkeypatch.setattr(checkpoint, "_handler", lambda _: (_ for _ in ()).throw(refused))
    trees = {"opt_state" if how == "tree" else "params": other}
    read = lambda *at: saved.restore(*at, trees)
    words = {
        "shape": r"^checkpoint .*params\['a'\]\['w'\]: expected shape \[16, 4\] by the config, got \[16, 3\] \(1 arrays",
        "name": "^checkpoint .*2 arrays differ",
    }
    words |= {
        "tree": "^checkpoint .*opt_state.*, got none",
        "permission": "^PERMISSION_DENIED",
    }
    with pytest.raises(ValueError if how == "permission" else RunRefused, match=words[how]):
        saved.newest(read)
    assert len(saved.found()) == 4 and not (saved.folder / "damaged").exists()


def test_the_newest_steps_and_every_stage_are_kept(tmp_path):
    kept = Checkpoints(tmp_path, keep=2, async_save=False)
    for step in range(1, 5):
        kept.save("steps", 1, step, {"params": tree()}, {})
        kept.save("stages", step, 9, {"params": tree()}, {})
    assert [(s, n) for s, n, kind in kept.found() if kind == "steps"] == [(1, 4), (1, 3)]
    assert len(kept.found()) == 6
    kept.close()


def test_arrays_that_are_being_saved_can_be_donated(tmp_path):
    """The next step overwrites the state while the background thread still writes it."""
    kept = Checkpoints(tmp_path)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros((1 << 22,))
    for step in range(1, 4):
        expected = np.array(x)
        kept.save("steps", 1, step, {"params": {"x": x}}, {})
        shape = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)}
        for _ in range(5):
            x = add(x)
        kept.wait()
        assert np.array_equal(
            kept.restore("steps", 1, step, {"params": shape})["params"]["x"], expected
        )
    kept.close()


def test_only_the_run_itself_removes_what_a_kill_left(tmp_path):
    Checkpoints(tmp_path).close()
    left = tmp_path / "steps" / f"{10**6 + 2}.orbax-checkpoint-tmp"
    (left / "params").mkdir(parents=True)
    other = Checkpoints(tmp_path)
    assert other.found() == [] and left.exists()
    other.close()
    own = Checkpoints(tmp_path, tidy=True)
    own.save("steps", 1, 2, {"params": tree()}, {})
    own.wait()
    assert own.found() == [(1, 2, "steps")] and not left.exists()
    own.close()


def test_a_save_is_due_after_steps_or_minutes(tmp_path):
    kept = Checkpoints(tmp_path, every=3, minutes=1.0)
    assert [kept.due(s) for s in (1, 2, 3, 6)] == [False, False, True, True]
    kept.saved -= 61
    assert kept.due(1)
    kept.close()
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_by_default_a_run_saves_every_20_minutes(tmp_path, monkeypatch):
    now, c, trees = [100.0], stage_fixtures.method_config("sft"), {"params": tree()}
    clock = types.SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep)
    monkeypatch.setattr(checkpoint, "time", clock)
    assert c.checkpoint == base.get_config().checkpoint
    with stage_fixtures.open_tiny_run(c, tmp_path, saved=True) as (run, _):
        kept = run.files.checkpoints
        assert [kept.due(1), kept.due(c.checkpoint.every)] == [False, True]
        now[0] += 60 * 20 - 1
        assert not kept.due(1)
        now[0] += 1
        assert kept.due(1)
        kept.save("steps", 1, 1, trees, {})
        assert not kept.due(2)
        kept.close()


def test_a_failed_save_raises_one_line(tmp_path):
    kept = Checkpoints(tmp_path / "c", async_save=False)
    shutil.rmtree(tmp_path / "c")
    (tmp_path / "c").write_text("a file")
    with pytest.raises(
        OSError, match="a checkpoint cannot be written to .*What was saved before is intact"
    ):
        kept.save("steps", 1, 1, {"params": tree()}, {})


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path, async_save=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 900, 100))
    with pytest.raises(OSError, match=": a checkpoint needs up to 0.0 MB, got 0.0 MB of free disk"):
        kept.save("steps", 1, 1, {"params": tree()}, {})
    assert not any((tmp_path / "steps").iterdir())
    kept.close()


def test_host_arrays_come_back_as_host_arrays(tmp_path):
    """A memory is not on the devices; what else a method keeps is."""
    kept = {
        "memory": {"seen": np.array(7, np.int32), "logps": np.linspace(0, 1, 6, dtype=np.float16)},
        "ewc": tree(devices=2),
    }
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save("stages", 1, 2, {"kept": kept}, {})
    checkpoints.save("stages", 2, 2, {"kept": {"memory": kept["memory"]}}, {})
    checkpoints.wait()
    found = checkpoints.restore("stages", 1, 2, {"kept": jax.tree.map(shape, kept)})["kept"]
    only = checkpoints.restore(
        "stages", 2, 2, {"kept": {"memory": jax.tree.map(shape, kept["memory"])}}
    )
    checkpoints.close()
    assert equal(found, kept) and equal(only["kept"]["memory"], kept["memory"])
    assert {type(x) for x in jax.tree.leaves(found["memory"])} == {np.ndarray}
    assert found["ewc"]["n"].sharding == kept["ewc"]["n"].sharding
