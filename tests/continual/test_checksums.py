"""Checksums do not depend on the mesh, and change with every bit of an array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cptjax import sharding
from cptjax.continual import checksums

DTYPES = (np.float32, jnp.bfloat16, np.int32, np.uint8, np.bool_)


def arrays(rng):
    return {str(np.dtype(t)): jnp.asarray(rng.normal(size=(16, 6)) * 9, t) for t in DTYPES}


@pytest.fixture(scope="module")
def tree():
    return arrays(np.random.default_rng(0)) | {"scalar": jnp.float32(3), "empty": jnp.zeros((0, 2))}


def test_a_checksum_is_the_same_on_every_mesh(tree):
    expected = checksums.array_checksums(tree)
    for devices, axes in ((2, "fsdp"), (8, "fsdp"), (4, "model")):
        shape = (1, devices, 1) if axes == "fsdp" else (1, devices // 2, 2)
        mesh = sharding.make_mesh(*shape, devices=jax.devices()[:devices])
        specs = {"fsdp": PartitionSpec("fsdp"), "model": PartitionSpec("fsdp", "model")}
        place = NamedSharding(mesh, specs[axes])
        placed = {k: jax.device_put(x, place) for k, x in tree.items() if x.ndim == 2 and len(x)}
        found = checksums.array_checksums(placed)
        assert found == {path: expected[path] for path in found} and len(found) == len(DTYPES)


def test_every_bit_counts_and_so_does_the_place(tree):
    """A flip of any bit, and of the same bit in two elements; two elements that change places."""
    rng, x = np.random.default_rng(1), np.asarray(tree["float32"])
    words = x.view(np.uint32).ravel()
    changed = []
    for bit in range(32):
        one, two = words.copy(), words.copy()
        places = rng.choice(words.size, 2, replace=False)
        one[places[0]] ^= np.uint32(1 << bit)
        two[places] ^= np.uint32(1 << bit)
        changed += [one, two]
    swapped = words.copy()
    swapped[[3, 5]] = swapped[[5, 3]]
    changed.append(swapped)
    variants = np.stack([words, *changed]).view(np.float32).reshape(-1, *x.shape)
    sums = checksums.array_checksums(list(jnp.asarray(variants)))
    assert len(set(sums.values())) == len(variants) == 66
    assert checksums.changed_arrays(tree, checksums.array_checksums(tree)) == []
    assert checksums.changed_arrays(
        {"float32": jnp.asarray(x + 1)}, checksums.array_checksums(tree)
    ) == ["['float32']"]
