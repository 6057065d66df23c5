"""Which micro-batches share a device pass, and how many tokens the passes then process."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from length_distributions import DISTRIBUTIONS, lengths_of

from cptjax import sharding
from cptjax.data.balance import GroupSizes
from cptjax.data.model_context import ModelContext
from cptjax.data.packing import row_size
from cptjax.models.families import PRESETS
from cptjax.training.device_passes import plan_passes
from cptjax.types import Prompts, Vision

LONGEST, LIMIT = 2048, 1024  # tokens of a prompt, of a response
PATCHES = 4 * 1300  # of an image of the largest size


def builder(attention="splash", remat="dots", shards=8):
    """7B on a mesh with so many batch shards."""
    cfg = PRESETS["7b"].with_compute(attention=attention, remat=remat)
    pixels = SimpleNamespace(max_pixels=1_000_000)
    mesh = sharding.make_mesh(1, shards, 1, devices=jax.devices()[:shards])
    processor = SimpleNamespace(pixels=pixels)
    return SimpleNamespace(
        model_ctx=ModelContext(cfg, processor, mesh, jnp.bfloat16, (LONGEST,)), tower=None
    )


def sizes(prompts, responses):
    """Return the sizes of a micro-batch: prompts [S q], responses [S q G]."""
    return GroupSizes(np.array(prompts), np.array(responses), np.zeros(len(prompts), int))


def prompts(length: int, patches: int = 0):
    """Return prompts of a bucket with images on a shard."""
    frames = np.zeros((1, 1, patches))
    vision = Vision(patches=None, positions=None, frames=frames) if patches else None
    return Prompts(np.zeros((8, length)), positions=None, segments=None, slots=None, vision=vision)


def plans(builder, prompts, parts, limit=LIMIT):
    """Return the plans of an update, whose passes have all micro-batches once and in order."""
    found = plan_passes(builder, prompts, parts, slice(0, len(parts)), limit)
    cuts = [plan.micro_batches for plan in found]
    assert [i for cut in cuts for i in range(cut.start, cut.stop)] == list(range(len(parts)))
    return found


def joined(builder, lengths, prompt=1400, bucket=1536, patches=PATCHES):
    """Return how many micro-batches each pass has; `lengths` of eight responses, by micro-batch."""
    parts = [sizes([[prompt]] * 8, np.full((8, 1, 8), n)) for n in lengths]
    found = plans(builder, [prompts(bucket, patches)] * len(lengths), parts)
    return [plan.micro_batches.stop - plan.micro_batches.start for plan in found]


def test_micro_batches_share_a_pass_that_is_no_larger_than_the_largest():
    """The largest has rows of 2,048 + 8 * 1,024 tokens."""
    assert joined(builder(), [1024, 1024]) == [1, 1]
    assert joined(builder(), [300, 300]) == [2]
    assert joined(builder(), [300, 1024]) == [1, 1]
    assert joined(builder(), [100] * 4, patches=0) == [4]
    assert joined(builder(), [300] * 4) == [2, 2]
    assert joined(builder(), [300] * 3) == [1, 1, 1]  # passes are equal
    assert joined(builder(), [300]) == [1]


def test_images_count_as_what_their_tower_keeps_for_the_backward_pass():
    few = dict(prompt=100, bucket=128)
    assert joined(builder(), [400, 400], **few) == [2]
    assert joined(builder(), [400, 400], **few, patches=8 * PATCHES) == [1, 1]
    frozen = builder()
    frozen.tower = {}
    assert joined(frozen, [400, 400], **few, patches=8 * PATCHES) == [2]


def test_attention_in_the_padded_form_counts_padding():
    lengths = [200, 200]
    assert joined(builder("tiled"), lengths) == [2]  # 2 * (1,536 + 8 * 256) tokens
    uneven = np.full((8, 1, 8), 100)
    uneven[0, 0, 0] = 1024
    for attention, passes in (("splash", 1), ("tiled", 2)):
        parts = [sizes([[1400]] * 8, uneven)] * 2
        assert len(plans(builder(attention), [prompts(1536)] * 2, parts)) == passes


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_padding_of_a_step_with_one_prompt_on_each_shard(name):
    """512 prompts in four updates of two micro-batches."""
    prompt, group, mean, limit = DISTRIBUTIONS[name]
    b, shards = builder(shards=8), 8
    processed = real = alone = 0
    for seed in range(8):
        lengths = lengths_of(mean, limit, (8, shards, 1, group), seed)
        parts = [sizes(np.full((shards, 1), prompt), r) for r in lengths]
        of_part = [prompts(1536 if prompt > 1024 else 768, 4 * (prompt - 100))] * 8
        for first in range(0, 8, 2):
            part = slice(first, first + 2)
            found = plans(b, of_part[part], parts[part], limit)
            processed += shards * sum(plan.longest for plan in found)
        real += 8 * shards * prompt + lengths.sum()
        capacity = prompt + group * limit
        alone += shards * sum(row_size(p.longest, capacity) for p in parts)
    assert processed / real <= 1.1
    assert alone / real > 1.3  # without joined passes and moved responses
    assert math.isclose(real / 8 / (8 * shards), prompt + group * mean, rel_tol=0.05)
