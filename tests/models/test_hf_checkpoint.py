"""Hugging Face checkpoints are read and written bit for bit, and damaged ones are refused."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_helpers
import tiny
from flax import traverse_util
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cptjax import sharding
from cptjax.models import causal_lm, decoder, hf_checkpoint, safetensors_io, trainable
from cptjax.models.config import ModelConfig, RopeConfig, TextConfig
from cptjax.models.families import FAMILIES, PRESETS
from cptjax.models.hf_config import config_to_hf, read_model_config
from cptjax.models.lora import add_lora
from cptjax.models.vision_qwen2_5 import Qwen25VisionConfig

HEAD_TENSOR, EMBED_TENSOR = "lm_head.weight", "model.embed_tokens.weight"
ADAPTERS = FAMILIES["qwen2_5_vl"].tower.adapters
ROOT = Path(__file__).parents[2]
CFG = ModelConfig(  # every axis divides by two, so that each mesh below can cut it
    family="qwen2_5_vl",
    vision=Qwen25VisionConfig(depth=2, width=32, mlp=48, heads=4, full_blocks=(1,)),
    text=TextConfig(
        vocab=64,
        width=32,
        mlp=48,
        depth=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        rope=RopeConfig(1e6, (1, 1, 2)),
        tied=False,
        qkv_bias=True,
        max_positions=128000,
    ),
    image_token=5,
    video_token=6,
    vision_start=3,
    vision_end=4,
    eos=(2, 0),
    pad=0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hf") / "several"
    hf_checkpoint.write_random_checkpoint(CFG, out, "bfloat16", shard_bytes=60_000)
    return out


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: x
        for file in sorted(folder.glob("*.safetensors"))
        for name, x in load_file(file).items()
    }


def rewrite(folder: Path, change) -> None:
    """Apply `change(dict)` to the tensors, and write them to one file."""
    found = tensors(folder)
    for file in folder.glob("model*"):
        file.unlink()
    change(found)
    save_file(found, folder / "model.safetensors")


def equal(a, b) -> bool:
    same = jax.tree.map(
        lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b
    )
    return all(jax.tree.leaves(same))


def fails(call, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_linear_weights_are_transposed_and_split_into_heads(folder):
    params, stored = hf_checkpoint.load_hf_checkpoint(folder, CFG), tensors(folder)
    d, n, h = CFG.text.width, CFG.text.heads, CFG.text.head_dim
    np.testing.assert_array_equal(
        params["text"]["blocks"]["q"]["w"][1],
        stored["model.layers.1.self_attn.q_proj.weight"].T.reshape(d, n, h),
    )
    np.testing.assert_array_equal(
        params["text"]["blocks"]["o"]["w"][0],
        stored["model.layers.0.self_attn.o_proj.weight"].T.reshape(n, h, d),
    )
    v = CFG.vision
    np.testing.assert_array_equal(
        params["vision"]["blocks"]["qkv"]["b"][1],
        stored["visual.blocks.1.attn.qkv.bias"].reshape(3, v.heads, v.head_dim),
    )
    np.testing.assert_array_equal(
        params["vision"]["patch"]["w"],
        stored["visual.patch_embed.proj.weight"].reshape(v.width, -1).T,
    )
    np.testing.assert_array_equal(params["text"]["embed"], stored["model.embed_tokens.weight"])


def test_every_leaf_of_the_model_is_loaded_in_its_shape(folder):
    declared, params = (
        hf_checkpoint.declared_leaves(CFG),
        traverse_util.flatten_dict(hf_checkpoint.load_hf_checkpoint(folder, CFG)),
    )
    assert {k: p.shape for k, p in declared.items()} == {k: x.shape for k, x in params.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shard_bytes", [30_000, 5e9])
def test_load_then_save_is_bit_identical(tmp_path, dtype, shard_bytes):
    hf_checkpoint.write_random_checkpoint(CFG, tmp_path / "a", dtype, shard_bytes)
    hf_checkpoint.save_hf_checkpoint(
        hf_checkpoint.load_hf_checkpoint(tmp_path / "a", CFG),
        CFG,
        tmp_path / "b",
        dtype=dtype,
        shard_bytes=2 * shard_bytes,
    )
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape for k in a
    )
    assert all(a[k].tobytes() == b[k].tobytes() for k in a)
    assert read_model_config(tmp_path / "b") == CFG
    assert not list(tmp_path.glob(".*")), "temporary folders are gone"


def test_the_index_lists_every_tensor_where_it_is(folder):
    index = json.loads((folder / safetensors_io.INDEX_FILE).read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors(folder).values())
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, "np") as f:
            assert name in f.keys() and f.metadata() == {"format": "pt"}


@pytest.mark.parametrize("source", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("wanted", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_every_type_is_read_as_every_type(tmp_path, source, wanted):
    hf_checkpoint.write_random_checkpoint(CFG, tmp_path / "a", source)
    found = hf_checkpoint.load_hf_checkpoint(tmp_path / "a", CFG, dtype=wanted)["text"]["blocks"][
        "up"
    ]["w"][1]
    expected = tensors(tmp_path / "a")["model.layers.1.mlp.up_proj.weight"].T.astype(wanted)
    assert (
        found.dtype == wanted
        and np.asarray(found).tobytes() == np.ascontiguousarray(expected).tobytes()
    )


def test_tensors_of_several_dtypes_keep_their_values(tmp_path):
    """The embedding in bfloat16, norms in float16 and bfloat16, the rest in float32."""
    narrow = {EMBED_TENSOR: jnp.bfloat16, "model.layers.0.input_layernorm.weight": np.float16}
    narrow["model.layers.1.input_layernorm.weight"] = jnp.bfloat16
    hf_checkpoint.write_random_checkpoint(CFG, tmp_path / "a", "float32")
    rewrite(tmp_path / "a", lambda t: t.update({k: t[k].astype(d) for k, d in narrow.items()}))
    stored = tensors(tmp_path / "a")
    params = hf_checkpoint.load_hf_checkpoint(tmp_path / "a", CFG)
    flat = trainable.flatten_params(params)
    assert {path for path, x in flat.items() if x.dtype != np.float32} == {("text", "embed")}
    hf_checkpoint.save_hf_checkpoint(params, CFG, tmp_path / "b", dtype="float32")
    for name, x in tensors(tmp_path / "b").items():
        assert np.array_equal(x, stored[name].astype(np.float32)), name
    params = hf_checkpoint.load_hf_checkpoint(tmp_path / "a", CFG, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2), (8, 1, 1), (1, 1, 4)])
def test_a_mesh_loads_the_same_tree_with_the_declared_shardings(folder, shape):
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
    params = hf_checkpoint.load_hf_checkpoint(folder, CFG, mesh)
    rules = sharding.rules_for(CFG.text.kv_heads, mesh)
    assert jax.tree.map(lambda x: x.sharding, params) == sharding.param_shardings(
        causal_lm.declare_params(CFG), mesh, rules
    )
    assert equal(params, hf_checkpoint.load_hf_checkpoint(folder, CFG))
    for shard in params["text"]["blocks"]["q"][
        "w"
    ].addressable_shards:  # and so is each device's own part
        assert np.array_equal(
            shard.data, np.asarray(params["text"]["blocks"]["q"]["w"])[shard.index]
        )


def test_saving_from_a_mesh_writes_the_same_file(folder, tmp_path):
    mesh = sharding.make_mesh(2, 2, 2)
    hf_checkpoint.save_hf_checkpoint(
        hf_checkpoint.load_hf_checkpoint(folder, CFG, mesh), CFG, tmp_path / "b"
    )
    a, b = tensors(folder), tensors(tmp_path / "b")
    assert all(a[k].tobytes() == b[k].tobytes() for k in a | b)


def test_the_names_of_newer_transformers_are_read(copy):
    def newer(found):
        for name in list(found):
            start, rest = name.split(".", 1)
            if start != "lm_head":
                found[
                    f"model.visual.{rest}" if start == "visual" else f"model.language_model.{rest}"
                ] = found.pop(name)

    before = hf_checkpoint.load_hf_checkpoint(copy, CFG)
    rewrite(copy, newer)
    assert equal(before, hf_checkpoint.load_hf_checkpoint(copy, CFG))


def test_rotary_frequencies_of_older_checkpoints_are_ignored(copy):
    before = hf_checkpoint.load_hf_checkpoint(copy, CFG)
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    rewrite(copy, lambda t: t.update({name.format(i): np.ones(4, np.float32) for i in range(2)}))
    assert equal(before, hf_checkpoint.load_hf_checkpoint(copy, CFG))


def test_adapters_are_merged_on_save(tmp_path):
    """The export has the logits of the model with adapters; those of both towers matter."""
    cfg, rng = dataclasses.replace(tiny.our_config(), lora_scale=0.5), np.random.default_rng(1)
    declared = trainable.flatten_params(add_lora(causal_lm.declare_params(cfg), 4, vision=ADAPTERS))
    lora = {
        path: jnp.float32(0.1 * rng.normal(size=p.shape))
        for path, p in declared.items()
        if trainable.is_adapter(path)
    }
    base = jax.tree.map(jnp.asarray, tiny.random_params(cfg))
    params = trainable.join_params(trainable.unflatten_params(lora), base)
    hf_checkpoint.save_hf_checkpoint(params, cfg, tmp_path / "merged", dtype="float32")
    merged = hf_checkpoint.load_hf_checkpoint(
        tmp_path / "merged", read_model_config(tmp_path / "merged")
    )
    prompts = tiny.prompts([tiny.random_row([5, tiny.Image(6, 10), 9], cfg, rng)], cfg)
    logits = jax.jit(lambda p: causal_lm.forward(p, prompts, cfg) @ decoder.unembedding(p["text"]))
    wanted, text_alone = logits(params), logits(params | {"vision": base["vision"]})
    np.testing.assert_allclose(
        logits(merged), wanted, atol=1e-5 * float(jnp.abs(wanted).max()), rtol=0
    )
    assert jnp.abs(text_alone - wanted).max() > 0.1 < jnp.abs(text_alone - logits(base)).max()


def test_a_tied_checkpoint_may_repeat_its_embedding_as_head(tmp_path):
    cfg = dataclasses.replace(CFG, text=dataclasses.replace(CFG.text, tied=True))
    hf_checkpoint.write_random_checkpoint(cfg, tmp_path / "a")
    assert HEAD_TENSOR not in tensors(tmp_path / "a")
    rewrite(
        tmp_path / "a",
        lambda t: t.update({HEAD_TENSOR: t[EMBED_TENSOR].copy()}),
    )
    assert "unembed" not in hf_checkpoint.load_hf_checkpoint(tmp_path / "a", cfg)["text"]
    rewrite(
        tmp_path / "a",
        lambda t: t.update({HEAD_TENSOR: t[EMBED_TENSOR] * 2}),
    )
    fails(
        lambda: hf_checkpoint.load_hf_checkpoint(tmp_path / "a", cfg),
        "tie_word_embeddings",
        "differs",
    )


SPOILED = {
    "unmapped": (lambda t: t.update(extra=np.zeros(3, np.float32)), "holds extra"),
    "missing": (
        lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
        "lacks model.layers.1.mlp.up_proj.weight",
    ),
    "misshapen": (
        lambda t: t.update({"model.norm.weight": np.ones(7, np.float32)}),
        "model.norm.weight has shape (7,)",
    ),
    "duplicate": (
        lambda t: t.update(
            {"model.visual.merger.ln_q.weight": t["visual.merger.ln_q.weight"].copy()}
        ),
        "already read as",
    ),
    "integers": (lambda t: t.update({"model.norm.weight": np.ones(32, np.int8)}), "stored as I8"),
    "fewer layers in config": (
        lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t["model.norm.weight"].copy()}),
        "layers.2",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_damaged_tensors_are_one_line_each(copy, case):
    change, words = SPOILED[case]
    rewrite(copy, change)
    fails(lambda: hf_checkpoint.load_hf_checkpoint(copy, CFG), words)


def test_damaged_files_are_one_line_each(copy, tmp_path):
    file = sorted(copy.glob("*.safetensors"))[1]
    whole = file.read_bytes()
    for spoiled in (whole[:-5], whole[:6], b"", b"not safetensors at all"):
        file.write_bytes(spoiled)
        fails(lambda: hf_checkpoint.load_hf_checkpoint(copy, CFG), str(file.name), "truncated")
    file.unlink()
    fails(
        lambda: hf_checkpoint.load_hf_checkpoint(copy, CFG),
        safetensors_io.INDEX_FILE,
        file.name,
        "missing shard",
    )
    (copy / safetensors_io.INDEX_FILE).write_text("{}")
    fails(lambda: hf_checkpoint.load_hf_checkpoint(copy, CFG), "not a safetensors index")
    shutil.copy(next(copy.glob("*.safetensors")), copy / "again.safetensors")
    (copy / safetensors_io.INDEX_FILE).unlink()
    fails(lambda: hf_checkpoint.load_hf_checkpoint(copy, CFG), "again.safetensors", "already read")
    (tmp_path / "empty").mkdir()
    fails(lambda: hf_checkpoint.load_hf_checkpoint(tmp_path / "empty", CFG), "no *.safetensors")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"")
    fails(lambda: hf_checkpoint.load_hf_checkpoint(tmp_path / "empty", CFG), "pickled")


def test_the_index_may_not_leave_its_folder(copy, tmp_path):
    shutil.copy(next(copy.glob("*.safetensors")), tmp_path / "outside.safetensors")
    (copy / safetensors_io.INDEX_FILE).write_text(
        json.dumps({"weight_map": {"a": "../outside.safetensors"}})
    )
    fails(lambda: hf_checkpoint.load_hf_checkpoint(copy, CFG), "outside.safetensors")


def test_the_config_of_another_model_is_refused(copy):
    raw = config_to_hf(CFG) | {"model_type": "gemma3"}
    (copy / "config.json").write_text(json.dumps(raw))
    fails(lambda: read_model_config(copy), "model_type", "gemma3", "qwen2_5_vl", "llama")


def test_save_refuses_what_it_cannot_write(folder, tmp_path):
    params = hf_checkpoint.load_hf_checkpoint(folder, CFG)
    fails(lambda: hf_checkpoint.save_hf_checkpoint(params, CFG, folder), "exists already")
    fails(
        lambda: hf_checkpoint.save_hf_checkpoint(params, CFG, tmp_path / "x", dtype="int8"), "int8"
    )
    fails(
        lambda: hf_checkpoint.save_hf_checkpoint({"text": params["text"]}, CFG, tmp_path / "x"),
        "no leaf",
    )
    fails(
        lambda: hf_checkpoint.save_hf_checkpoint(
            params | {"more": params["text"]["norm"]}, CFG, tmp_path / "x"
        ),
        "more",
    )
    fails(lambda: hf_checkpoint.save_hf_checkpoint(params, PRESETS["7b"], tmp_path / "x"), "shape")
    assert list(tmp_path.iterdir()) == [], "a failed save leaves nothing behind"


TWO = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("localhost:" + sys.argv[1], 2, int(sys.argv[2]))
from cptjax import sharding
from cptjax.models.hf_config import read_model_config
from cptjax.models.hf_checkpoint import load_hf_checkpoint, save_hf_checkpoint
from cptjax.models.orbax_io import load_orbax, save_orbax
root = Path(sys.argv[3])
cfg, mesh = read_model_config(root / "src"), sharding.make_mesh(2, 2, 2)
save_orbax(load_hf_checkpoint(root / "src", cfg, mesh), cfg, root / "orbax")
save_hf_checkpoint(load_orbax(root / "orbax", mesh)[0], cfg, root / "back", shard_bytes=50_000)
assert (root / "back").is_dir(), "every process returns when the folder is there"
"""


@pytest.mark.slow
def test_two_processes_write_what_one_wrote(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "src")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    env = run_helpers.environment(JAX_NUM_CPU_DEVICES="4")
    command = lambda i: [sys.executable, "-c", TWO, port, str(i), str(tmp_path)]
    running = [
        subprocess.Popen(command(i), env=env, stdout=-1, stderr=-2, text=True) for i in range(2)
    ]
    for process in running:
        out = process.communicate(timeout=300)[0]
        assert process.returncode == 0, out[-3000:]
    a, b = tensors(folder), tensors(tmp_path / "back")
    assert all(a[k].tobytes() == b[k].tobytes() for k in a | b)


MEASURE = """
import sys, jax
from cptjax.models.hf_config import read_model_config
from cptjax.models.hf_checkpoint import load_hf_checkpoint
def of(key): return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1])
jax.block_until_ready(jax.numpy.zeros(3) + 1)
before = of("VmRSS:")
params = load_hf_checkpoint(sys.argv[1], read_model_config(sys.argv[1]))
print((of("VmHWM:") - before) * 1024, sum(x.nbytes for x in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_of_a_load_stays_near_the_size_of_the_checkpoint(tmp_path):
    big = dataclasses.replace(
        CFG.text,
        vocab=20_000,
        width=1024,
        mlp=4096,
        depth=6,
        heads=8,
        head_dim=128,
        rope=RopeConfig(1e6, (16, 24, 24)),
    )
    cfg = dataclasses.replace(
        CFG, text=big, vision=dataclasses.replace(CFG.vision, width=256, mlp=512, depth=4)
    )
    hf_checkpoint.write_random_checkpoint(cfg, tmp_path / "big", shard_bytes=1e8)
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "big")],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    peak, size = map(int, out.stdout.split())
    print(f"peak {peak / size:.3f} x {size / 1e6:.0f} MB")
    assert size > 2e8 and peak < 1.3 * size


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_computes_the_same_logits_from_the_saved_folder(tmp_path, tied):
    torch = pytest.importorskip("torch")
    import tiny
    from transformers import Qwen2_5_VLForConditionalGeneration as Model

    source = tiny.save(tmp_path / "hf", dtype="bfloat16", shard="100KB", tied=tied)
    cfg = read_model_config(source)
    hf_checkpoint.save_hf_checkpoint(
        hf_checkpoint.load_hf_checkpoint(source, cfg), cfg, tmp_path / "ours", shard_bytes=1e5
    )
    models = []
    for folder in (source, tmp_path / "ours"):
        model, info = Model.from_pretrained(folder, output_loading_info=True, dtype=torch.bfloat16)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
            info
        )
        models.append(model.eval())
    rows = [tiny.random_row([5, tiny.Image(8, 12), 9], cfg, np.random.default_rng(0))]
    inputs = tiny.hf_inputs(rows, cfg)
    with torch.no_grad():
        a, b = (m(**inputs).logits for m in models)
    assert torch.equal(a, b)
