"""Qwen3-VL's vision tower equals that of transformers, layer by layer; its layout and table."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptjax import sharding
from cptjax.models import vision_qwen3
from cptjax.models.config import ModelConfig, TextConfig
from cptjax.models.vision_qwen2_5 import normalise_patches, vision_cos_sin
from cptjax.models.vision_qwen3 import Qwen3VisionConfig
from cptjax.types import Vision

V = Qwen3VisionConfig(
    depth=5, width=64, mlp=80, heads=8, patch=8, merge=2, table=6, deepstack=(0, 2, 3)
)
TEXT_WIDTH = 48
FRAMES = [(4, 6), (8, 8), (8, 8), (2, 14)]  # the second and third are a video
GRIDS = [(1, 4, 6), (2, 8, 8), (1, 2, 14)]


CFG = ModelConfig(
    "qwen3_vl",
    TextConfig(vocab=64, width=TEXT_WIDTH, mlp=64, depth=3, heads=2, kv_heads=2, head_dim=16),
    V,
)


@pytest.mark.parametrize("h,w,side", [(2, 2, 48), (2, 34, 5), (16, 22, 5), (50, 96, 48)])
def test_the_layout_and_the_table_rows_are_those_of_transformers(h, w, side):
    torch = pytest.importorskip("torch")
    from transformers import vision_utils

    grid = torch.tensor([[1, h, w]])
    theirs, shares = vision_utils.get_vision_interpolation_indices_and_weights(
        grid, side, "bilinear", align_corners=True, spatial_merge_size=2
    )
    layout = vision_qwen3.whole_frame_layout(h, w, V)
    rows, weights = vision_qwen3.table_rows(layout.positions, side)
    np.testing.assert_array_equal(rows, theirs.numpy())
    np.testing.assert_array_equal(weights, shares.numpy())
    places = vision_utils.get_vision_position_ids(grid, 2).numpy()
    np.testing.assert_array_equal(layout.positions[:, :2], places)
    assert layout.order.tolist() == list(range(h * w))
    assert layout.units.tolist() == list(range(h * w // 4))


def test_a_frame_as_large_as_the_table_takes_its_rows():
    places = vision_qwen3.whole_frame_layout(6, 6, V).positions
    rows, weights = (np.asarray(x) for x in vision_qwen3.table_rows(places, 6))
    assert weights.max(1).tolist() == [1] * 36
    assert rows[np.arange(36), weights.argmax(1)].tolist() == (places[:, :2] @ [6, 1]).tolist()


def _torch_tower():
    """Return transformers' tower, and its parameters as our trees of tower and mergers."""
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    config = Qwen3VLVisionConfig(
        depth=V.depth,
        hidden_size=V.width,
        intermediate_size=V.mlp,
        num_heads=V.heads,
        patch_size=V.patch,
        num_position_embeddings=V.table**2,
        deepstack_visual_indexes=list(V.deepstack),
        out_hidden_size=TEXT_WIDTH,
    )
    torch.manual_seed(0)
    model = Qwen3VLVisionModel(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            p.copy_(1 + 0.1 * noise if "norm" in name and "weight" in name else 0.1 * noise)
    state = {name: p.detach().numpy() for name, p in model.named_parameters()}

    def module(name: str, ours: dict) -> dict:
        return {
            leaf: state[f"{name}.{'weight' if leaf == 'w' else 'bias'}"].T.reshape(
                p.shape
            )  # .T does not change a vector
            for leaf, p in ours.items()
        }

    def stack(name: str, ours: dict, count: int) -> dict:
        one = {k: dataclasses.replace(p, shape=p.shape[1:]) for k, p in ours.items()}
        layers = [module(name.format(i), one) for i in range(count)]
        return jax.tree.map(lambda *x: np.stack(x), *layers)

    declared = vision_qwen3.declare_frame_tower(CFG)
    tower, merger = declared["vision"], declared["merger"]
    within = {"qkv": "attn.qkv", "proj": "attn.proj", "up": "mlp.linear_fc1"}
    within |= {"down": "mlp.linear_fc2", "norm1": "norm1", "norm2": "norm2"}
    blocks = {
        name: stack("blocks.{}." + within[name], p, V.depth) for name, p in tower["blocks"].items()
    }
    fc = {"norm": "norm", "fc1": "linear_fc1", "fc2": "linear_fc2"}
    deep = {
        name: stack("deepstack_merger_list.{}." + fc[name], p, len(V.deepstack))
        for name, p in merger.pop("deepstack").items()
    }
    last = {name: module("merger." + fc[name], p) for name, p in merger.items()}
    patch = state["patch_embed.proj.weight"].reshape(V.width, -1).T
    tower = {
        "patch": {"w": patch, "b": state["patch_embed.proj.bias"]},
        "table": state["pos_embed.weight"],
        "blocks": blocks,
    }
    return model, tower, last | {"deepstack": deep}


def _vision(seed: int, gap: int = 3) -> tuple[Vision, np.ndarray, np.ndarray]:
    """Return random frames in one row with empty slots between them, patches, and full slots."""
    layouts = [vision_qwen3.whole_frame_layout(h, w, V) for h, w in FRAMES]
    n = sum(len(x.order) for x in layouts)
    patches = np.random.default_rng(seed).integers(0, 256, (n, V.patch_dim), np.uint8)
    slots = n + 4 * gap * len(FRAMES)
    out = Vision(
        np.zeros((1, 1, slots, V.patch_dim), np.uint8),
        np.zeros((1, 1, slots, V.position_values), np.int32),
        np.zeros((1, 1, slots), np.int32),
    )
    start = taken = 0
    for number, layout in enumerate(layouts, 1):
        here = (0, 0, slice(start, start + len(layout.order)))
        out.patches[here] = patches[taken : taken + len(layout.order)]
        out.positions[here], out.frames[here] = layout.positions, number
        taken, start = taken + len(layout.order), start + len(layout.order) + 4 * gap
    return out, patches, out.frames[0, 0] > 0


@functools.partial(jax.jit, static_argnums=2)
def _encode(params, vision, cfg):
    states = vision_qwen3.run_frame_tower(params, vision, cfg, jnp.float32)
    return vision_qwen3.merge_frame_states(params, states, cfg)


@pytest.fixture(scope="module")
def tower():
    """(transformers' tower, the same parameters as our tree)."""
    model, ours, merger = _torch_tower()
    return model, {"vision": ours, "merger": merger}


def test_features_and_every_block_equal_transformers(tower):
    torch = pytest.importorskip("torch")
    model, params = tower
    vision, patches, real = _vision(0)
    caught = []
    hooks = [b.register_forward_hook(lambda *x: caught.append(x[2].numpy())) for b in model.blocks]
    with torch.no_grad():
        theirs = model(
            torch.tensor(normalise_patches(patches, V)), torch.tensor(GRIDS), return_dict=True
        )
    for hook in hooks:
        hook.remove()
    ours = _encode(params, vision, CFG)
    units = real.reshape(-1, 4)[:, 0]
    wanted = [theirs.pooler_output, *theirs.deepstack_features]
    for mine, want in zip([ours.merged, *ours.added], wanted, strict=True):
        assert np.abs(want.numpy()).max() > 1
        np.testing.assert_allclose(np.asarray(mine)[0, units], want.numpy(), atol=1e-4)
    for x, want in zip(_run_by_one(params, vision, CFG)[0], caught, strict=True):
        np.testing.assert_allclose(np.asarray(x)[0, real], want, atol=1e-4)


@functools.partial(jax.jit, static_argnums=2)
def _run_by_one(params, vision, cfg):
    """Return the patches after each block and the features, by a loop over the blocks."""
    x, seen = vision_qwen3.embed_patches(params["vision"], vision, V, jnp.float32), []
    rope = vision_cos_sin(vision.positions[0, ..., :2], V)
    for i in range(V.depth):
        block = jax.tree.map(lambda w, i=i: w[i], params["vision"]["blocks"])
        x = vision_qwen3.frame_block(block, x, rope, vision.frames[0], cfg)
        seen.append(x)
    merger = params["merger"]
    kept = jnp.stack([seen[i] for i in V.deepstack])
    return (
        seen,
        vision_qwen3.merge_last(merger, x, V.merge),
        vision_qwen3.merge_deepstack(merger["deepstack"], kept, V.merge),
    )


def test_frames_and_empty_slots_do_not_see_each_other(tower):
    """Other pixels in one frame and in empty slots change no bit of the other frames' features."""
    params, (vision, _, _) = tower[1], _vision(1)
    other = vision.replace(patches=np.where(vision.frames[..., None] <= 1, 5, vision.patches))
    numbers = vision.frames[0, 0].reshape(-1, 4)[:, 0]
    pair = _encode(params, vision, CFG), _encode(params, other, CFG)
    for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
        assert np.array_equal(a[..., numbers > 1, :], b[..., numbers > 1, :])
        assert np.abs(a[..., numbers == 1, :] - b[..., numbers == 1, :]).max() > 0.1


@pytest.mark.parametrize("remat", ["none", "block"])
def test_gradients_equal_those_of_a_loop_over_the_blocks(tower, remat):
    """The scan carries the features of `deepstack`; the loop keeps them in a list."""
    params, (vision, _, _) = tower[1], _vision(2)
    cfg = CFG.with_compute(remat=remat)

    def loss(merged, added):
        return jnp.sum(jnp.sin(merged)) + sum(
            (i + 2) * jnp.sum(jnp.cos(x)) for i, x in enumerate(added)
        )

    scanned = jax.jit(jax.grad(lambda p: loss(*_encode(p, vision, cfg))))(params)
    looped = jax.jit(jax.grad(lambda p: loss(*_run_by_one(p, vision, CFG)[1:])))(params)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(scanned), jax.tree.leaves(looped), strict=True
    ):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b), jax.tree_util.keystr(path)


def test_flops_are_those_of_the_compiled_tower():
    """One block; a scan counts it once."""
    v = dataclasses.replace(V, depth=1, deepstack=(0,), width=256, mlp=512, patch=16)
    cfg = dataclasses.replace(CFG, vision=v)
    params = sharding.abstract_params(vision_qwen3.declare_frame_tower(cfg), jnp.float32)
    array = lambda *shape, kind=jnp.float32: jax.ShapeDtypeStruct((1, 2, 512, *shape), kind)
    patches = array(v.patch_dim, kind=jnp.uint8)
    vision = Vision(patches, array(4, kind=jnp.int32), array(kind=jnp.int32))
    counted = _encode.lower(params, vision, cfg).cost_analysis()["flops"]
    formula = vision_qwen3.frame_tower_flops(cfg, 2 * 512, 512)
    assert counted == pytest.approx(formula, rel=0.05)
