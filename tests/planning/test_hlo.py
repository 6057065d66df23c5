"""Totals of programs: of a small text with known numbers, and of compiled CPU programs."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptjax import sharding
from cptjax.generation import token_sampling
from cptjax.planning import hlo, hlo_costs

LOOP = """\
HloModule jit_f

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%fused_slice (param_0: f32[7,128,64], param_1: s32[]) -> f32[128,64] {
  %param_0 = f32[7,128,64]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %dynamic-slice.1 = f32[1,128,64]{2,1,0} dynamic-slice(%param_0, %param_1), dynamic_slice_sizes={1,128,64}
  ROOT %bitcast.1 = f32[128,64]{1,0} bitcast(%dynamic-slice.1)
}

%all-reduce-scatter.1 (input: f32[32,64]) -> f32[8,64] {
  %input = f32[32,64]{1,0} parameter(0)
  %all-reduce.9 = f32[32,64]{1,0} all-reduce(%input), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %dynamic-slice.9 = f32[8,64]{1,0} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={8,64}
}

%body (p: (s32[], f32[32,128], f32[7,128,64])) -> (s32[], f32[32,128], f32[7,128,64]) {
  %p = (s32[], f32[32,128]{1,0}, f32[7,128,64]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %rows = f32[32,128]{1,0} get-tuple-element(%p), index=1
  %stack = f32[7,128,64]{2,1,0} get-tuple-element(%p), index=2
  %layer = f32[128,64]{1,0} fusion(%stack, %i), kind=kLoop, calls=%fused_slice
  %product = f32[32,64]{1,0} convolution(%rows, %layer), dim_labels=bf_io->bf
  %scattered = f32[8,64]{1,0} fusion(%product), kind=kCustom, calls=%all-reduce-scatter.1
  %gathered = f32[32,128]{1,0} all-gather(%scattered), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
  ROOT %out = (s32[], f32[32,128]{1,0}, f32[7,128,64]{2,1,0}) tuple(%i, %gathered, %stack)
}

%condition (p.1: (s32[], f32[32,128], f32[7,128,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %p.1 = (s32[], f32[32,128]{1,0}, f32[7,128,64]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  ROOT %lt = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: (s32[], f32[32,128], f32[7,128,64])) -> (s32[], f32[32,128], f32[7,128,64]) {
  %a = (s32[], f32[32,128]{1,0}, f32[7,128,64]{2,1,0}) parameter(0)
  ROOT %loop = (s32[], f32[32,128]{1,0}, f32[7,128,64]{2,1,0}) while(%a), condition=%condition, body=%body
}
"""


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(1, 4, 2)


def test_the_loop_of_the_text_runs_seven_times(mesh):
    computations, entry = hlo.parse_hlo(LOOP)
    assert entry == "main"
    assert hlo.run_counts(computations, entry) == {
        "add": 7.0,
        "fused_slice": 7.0,
        "all-reduce-scatter.1": 7.0,
        "body": 7.0,
        "condition": 0.0,
        "main": 1.0,
    }
    assert hlo_costs.count_flops(LOOP) == 7 * 2 * 32 * 128 * 64
    assert hlo.find_collectives(LOOP, mesh) == [
        hlo.Collective("all-gather", "fsdp", 4, 7 * 32 * 128 * 4, 7),
        hlo.Collective("reduce-scatter", "fsdp", 4, 7 * 32 * 64 * 4, 7),
    ]


def test_elements_of_tuples_may_have_no_instructions(mesh):
    """The compiler of jax 0.12 writes `%p#2` where it wrote an instruction for the element."""
    found = re.findall(r"  %(\S+) = \S+ get-tuple-element\(%(\S+)\), index=(\d)\n", LOOP)
    assert len(found) == 4
    text = re.sub(r"  \S+ = \S+ get-tuple-element.*\n", "", LOOP)
    for name, read, index in found:
        text = re.sub(rf"%{re.escape(name)}(?=[,)])", f"%{read}#{index}", text)
    assert "%convolution" not in text and "convolution(%p#1, %layer)" in text
    assert hlo.find_collectives(text, mesh) == hlo.find_collectives(LOOP, mesh)
    for count in (hlo_costs.count_flops, hlo_costs.count_memory_traffic):
        assert count(text) == count(LOOP) > 0
    computations, _ = hlo.parse_hlo(text)
    shapes = hlo_costs.instruction_shapes(computations["body"])
    assert shapes["p#2"] == "f32[7,128,64]{2,1,0}"
    assert hlo.tuple_shapes("(s32[]{:T(128)}, /*index=5*/(f32[2,3]{1,0}, u8[])) ".strip()) == [
        "s32[]{:T(128)}",
        "(f32[2,3]{1,0}, u8[])",
    ]


def test_a_text_that_reads_an_unknown_value_is_refused():
    text = LOOP.replace("%stack = f32", "%stacked = f32")
    with pytest.raises(ValueError, match="reads %stack, which it does not define"):
        hlo_costs.count_memory_traffic(text)


def test_an_unrolled_loop_runs_less_often():
    """The counter of a loop that the compiler has unrolled grows by 2: four turns for seven."""
    step = "  %two = s32[] constant(2)\n  %next = s32[] add(%i, %two)\n  ROOT %out = "
    text = LOOP.replace("  ROOT %out = ", step).replace(
        "tuple(%i, %gathered", "tuple(%next, %gathered"
    )
    assert hlo_costs.count_flops(text) == 4 * 2 * 32 * 128 * 64


def test_a_transfer_spread_over_fused_groups_counts_once(mesh):
    """The TPU compiler shows an asynchronous all-gather again in each product that runs at the
    same time.
    """
    mark = ', channel_id=5, frontend_attributes={chain_id="3"}'
    again = (
        "  %again = f32[32,128]{1,0} all-gather(%scattered), replica_groups={{0,2,4,6},{1,3,5,7}}"
        + mark
        + "\n  ROOT %out"
    )
    text = LOOP.replace("{'axis_0'}, dimensions={0}", "{'axis_0'}, dimensions={0}" + mark).replace(
        "  ROOT %out", again
    )
    assert hlo.find_collectives(text, mesh) == hlo.find_collectives(LOOP, mesh)


def test_a_sum_between_slices_goes_through_the_hosts(mesh):
    line = (
        "ENTRY %main (a: bf16[8,16]) -> bf16[8,16] {\n  %a = bf16[8,16]{1,0} parameter(0)\n  %t = token[] after-all()\n"
        "  %s = (bf16[8,16]{1,0}, u32[], token[]) send(%a, %t), channel_id=1, is_host_transfer=true, "
        'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}\n'
        "  %r = (bf16[8,16]{1,0}, u32[], token[]) recv(%t), channel_id=2, is_host_transfer=true, "
        'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}\n  ROOT %o = bf16[8,16]{1,0} get-tuple-element(%r), index=0\n}\n'
    )
    assert hlo.find_collectives(line, mesh) == [hlo.Collective("all-reduce", "data", 1, 256.0, 1.0)]


def test_a_transfer_along_data_may_stay_within_a_slice():
    """Eight devices of two slices, data=4: of two members in the same slice, of two in both, of
    all four, and a permutation whose second move leaves the slice.
    """
    mesh = sharding.make_mesh(4, 2, 1)
    for kind, groups, size, spanned in (
        ("all-reduce", "replica_groups={{0,2},{1,3},{4,6},{5,7}}", 2, 1),
        ("all-reduce", "replica_groups={{0,4},{1,5},{2,6},{3,7}}", 2, 2),
        ("all-reduce", "replica_groups={{0,2,4,6},{1,3,5,7}}", 4, 2),
        ("collective-permute", "source_target_pairs={{0,2},{2,4},{4,6}}", 2, 2),
    ):
        text = (
            "ENTRY %main (a: f32[16]) -> f32[16] {\n  %a = f32[16]{0} parameter(0)\n"
            f"  ROOT %r = f32[16]{{0}} {kind}(%a), {groups}\n}}\n"
        )
        found = hlo.find_collectives(text, mesh, slices=2)
        assert found == [hlo.Collective(kind, "data", size, 64.0, 1.0, slices=spanned)]


def test_a_slice_of_a_stack_moves_the_slice_only():
    layer, product, rows, scattered, gathered = 128 * 64, 32 * 64, 32 * 128, 8 * 64, 32 * 128
    words = (
        2 * layer + 1 + (rows + layer + product) + (product + scattered) + (scattered + gathered)
    )
    assert hlo_costs.count_memory_traffic(LOOP) == 7 * 4 * words


def test_batched_products_of_a_tpu_count_one_window_position_each():
    """A batch of 16 products [2048, 128] x [128, 64], written as a convolution whose window slides
    over the batch.
    """
    line = (
        "ENTRY %main (a: bf16[16,2048,128], b: bf16[16,128,64]) -> bf16[16,2048,64] {\n"
        "  %a = bf16[16,2048,128]{2,1,0} parameter(0)\n  %b = bf16[16,128,64]{2,1,0} parameter(1)\n"
        "  ROOT %c = bf16[16,2048,64]{2,1,0} convolution(%a, %b), "
        "window={size=16 stride=15 pad=0_0 lhs_dilate=16}, dim_labels=0bf_0io->0bf\n}\n"
    )
    assert hlo_costs.count_flops(line) == 2 * 16 * 2048 * 128 * 64


KERNEL = """\
ENTRY %main (a: bf16[2,384,128], b: bf16[2,384,128]) -> bf16[2,384,128] {
  %a = bf16[2,384,128]{2,1,0} parameter(0)
  %b = bf16[2,384,128]{2,1,0} parameter(1)
  ROOT %splash_mqa_fwd.1 = bf16[2,384,128]{2,1,0} custom-call(%a, %b), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[2,384,128]{2,1,0}, bf16[2,384,128]{2,1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/vision/pallas_call"}
}
"""


def test_a_kernel_of_the_vision_tower_is_not_causal():
    """Its name is in a later line: the attributes of the kernel have several."""
    products = 2 * 2 * 2 * 384 * 384 * 128
    assert hlo_costs.count_flops(KERNEL) == products
    assert hlo_costs.count_flops(KERNEL.replace("vision/", "")) == products * 385 / 2 / 384


def test_a_kernel_costs_what_it_states():
    """As for a kernel that reads a part of its operands, and is given each of them twice."""
    cost = 'backend_config={"cost_estimate":{"bytes_accessed":"700","flops":"30","transcendentals":"4"}}'
    text = KERNEL.replace("splash_mqa_fwd", "kernel").replace(
        'pallas_call"}', 'pallas_call"}, ' + cost
    )
    assert hlo_costs.count_flops(text) == 30
    assert hlo_costs.count_memory_traffic(text) == 700


@pytest.mark.parametrize("length", [1, 6])
def test_a_scan_counts_as_often_as_it_runs(length):
    run = jax.jit(lambda x, w: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])
    done = run.lower(jnp.ones((64, 96)), jnp.ones((length, 96, 96))).compile()
    assert hlo_costs.count_flops(done.as_text()) == length * 2 * 64 * 96 * 96


def test_a_loop_with_a_computed_end_runs_as_often_as_given():
    """Also the loop inside it whose end is computed: it counts once a turn of the outer one."""

    def run(x, w):
        inner = lambda s: (
            s[0] + 1,
            jax.lax.fori_loop(0, s[0] + 2, lambda _, y: jnp.tanh(y @ w), s[1]),
        )
        return jax.lax.while_loop(lambda s: (s[0] < 9) & (jnp.sum(s[1]) > 0), inner, (0, x))[1]

    text = jax.jit(run).lower(jnp.ones((64, 96)), jnp.ones((96, 96))).compile().as_text()
    once = 2 * 64 * 96 * 96
    assert (
        hlo_costs.count_flops(text) == once and hlo_costs.count_flops(text, dynamic=31) == 31 * once
    )


def test_transfers_of_a_sharded_product_have_their_axes(mesh):
    """x [rows/fsdp, D] times w [D/fsdp, F/model], then back: weights are gathered over fsdp,
    products summed over model.
    """
    put = lambda shape, axes: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=sharding.named_sharding(axes, mesh, shape)
    )
    args = (
        put((64, 128), ("batch", None)),
        put((128, 256), ("embed", "mlp")),
        put((256, 128), ("mlp", "embed")),
    )

    def run(x, up, down):
        return sharding.constrain(
            jnp.tanh(sharding.constrain(x @ up, "batch", "mlp")) @ down, "batch", None
        )

    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(*args).compile().as_text()
    collectives = {(c.kind, c.axis): c for c in hlo.find_collectives(text, mesh)}
    assert hlo_costs.count_flops(text) == 2 * 2 * (64 // 4) * 128 * (256 // 2)
    assert collectives["all-reduce", "model"].bytes == 64 // 4 * 128 * 4
    assert (
        sum(
            c.bytes
            for (kind, axis), c in collectives.items()
            if (kind, axis) == ("all-gather", "fsdp")
        )
        == 2 * 128 * (256 // 2) * 4
    )


BRANCHES = """\
HloModule jit_g

%greedy (g: f32[8,8]) -> f32[8,8] {
  ROOT %g = f32[8,8]{1,0} parameter(0)
}

%random (r: f32[8,8]) -> f32[8,8] {
  %r = f32[8,8]{1,0} parameter(0)
  ROOT %product = f32[8,8]{1,0} dot(%r, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (n: s32[], a: f32[8,8]) -> f32[8,8] {
  %n = s32[] parameter(0)
  %a = f32[8,8]{1,0} parameter(1)
  ROOT %c = f32[8,8]{1,0} conditional(%n, %a, %a), branch_computations={%random, %greedy}
}
"""


def test_branches_of_a_conditional_count_in_equal_parts():
    products = 2 * 8 * 8 * 8
    assert hlo_costs.count_flops(BRANCHES) == products / 2
    named = BRANCHES.replace(
        "branch_computations={%random, %greedy}",
        "true_computation=%greedy, false_computation=%random",
    )
    assert hlo_costs.count_flops(named) == products / 2


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_sampling_has_no_conditional_of_unknown_share(top_p):
    """Filters that are off are not part of the program."""
    controls = token_sampling.make_controls(1.0, 0, top_p, 0.0, np.zeros(512, bool))
    sample = jax.jit(token_sampling.sample_tokens)
    text = sample.lower(jnp.ones((2, 512)), jnp.ones(2), controls).compile().as_text()
    assert " conditional(" not in text


def test_an_asynchronous_slice_moves_the_slice_only():
    """Of 1,024 bytes, 256 are read into the vector memory S(1)."""
    text = """\
%slice_of (p: s8[1024]) -> s8[256] {
  %p = s8[1024]{0} parameter(0)
  ROOT %s = s8[256]{0:S(1)} slice(%p), slice={[0:256]}
}

ENTRY %main (a: s8[1024]) -> s8[256] {
  %a = s8[1024]{0} parameter(0)
  %start = ((s8[1024]{0}), s8[256]{0:S(1)}, s32[]{:S(2)}) async-start(%a), calls=%slice_of
  ROOT %done = s8[256]{0:S(1)} async-done(%start)
}
"""
    assert hlo_costs.count_memory_traffic(text) == 256
    kept_in_main = text.replace("{0:S(1)}", "{0}")
    assert hlo_costs.count_memory_traffic(kept_in_main) == 2 * 256


def test_a_copy_into_the_vector_memory_reads_its_array_once():
    text = """\
ENTRY %main (a: f32[100]) -> f32[100] {
  %a = f32[100]{0} parameter(0)
  %start = (f32[100]{0}, f32[100]{0:S(1)}, u32[]{:S(2)}) copy-start(%a)
  ROOT %done = f32[100]{0:S(1)} copy-done(%start)
}
"""
    assert hlo_costs.count_memory_traffic(text) == 400


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a torus."""

    coords: tuple[int, int, int]
    device_kind: str
    platform: str = "tpu"


@pytest.mark.parametrize(
    ("kind", "slice_shape", "mesh_shape", "links"),
    [
        ("TPU v6 lite", (4, 4, 1), (1, 4, 4), 1),  # a line: no connection between its ends
        ("TPU v6 lite", (16, 16, 1), (1, 16, 16), 2),
        ("TPU v6 lite", (16, 16, 1), (1, 256, 1), 4),  # two closed axes
        ("TPU v6 lite", (16, 16, 1), (1, 64, 4), 1),  # 4 of 16 devices of an axis
        ("TPU v5", (4, 4, 4), (1, 16, 4), 2),
        ("TPU v5", (4, 4, 4), (1, 1, 64), 6),
    ],
)
def test_rings_use_the_links_that_a_slice_has(kind, slice_shape, mesh_shape, links):
    """An all-gather over the last axis of the mesh that is cut."""
    devices = [Chip(at, kind) for at in np.ndindex(slice_shape)]
    grid = np.empty(len(devices), object)
    grid[:] = devices
    mesh = types.SimpleNamespace(
        devices=grid.reshape(mesh_shape), axis_names=("data", "fsdp", "model")
    )
    n = next(n for n in reversed(mesh_shape) if n > 1)
    text = (
        "ENTRY %main (a: f32[1]) -> f32[1] {\n  %a = f32[1]{0} parameter(0)\n  ROOT %g = "
        f"f32[{n}]{{0}} all-gather(%a), replica_groups=[{len(devices) // n},{n}]<="
        f"[{len(devices)}], dimensions={{0}}\n}}\n"
    )
    (found,) = hlo.find_collectives(text, mesh)
    assert (found.size, found.links) == (n, links)


REPORT = """\
Memory Space: default (color=0)
Total bytes: 9238545760 (8.60GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
    1.01GiB(  7%);    1.01GiB;    560660480;                2; 2×bf16[152064,3584]
    1.44GiB( 12%);  444.00MiB;   3268771840;                2; 2×bf16[4,12288,4736,1]

Memory Space: vmem (color=1)
   47.00MiB(100%);   47.00MiB;            0;                1; bf16[1,1]
"""


def test_the_largest_buffers_are_those_of_the_main_memory():
    assert hlo.largest_buffers(REPORT) == [
        (1.01 * 2**30, "2×bf16[152064,3584]"),
        (444 * 2.0**20, "2×bf16[4,12288,4736,1]"),
    ]


@pytest.mark.parametrize("module", ["module_0000", "module_0024"])  # 24 were compiled before it
def test_sizes_are_read_where_the_compiler_has_written_them(tmp_path, module):
    assert hlo.read_buffer_sizes(str(tmp_path)) == {}
    (tmp_path / f"{module}.f.after_optimizations-buffer-assignment.txt").write_text(
        "allocation 0: size 100, page 0, parameter 0, shape |f32[25]| at ShapeIndex {}:\n"
        "allocation 1: size 40, page 0, parameter 1, shape |f32[10]| at ShapeIndex {}, maybe-live-out:\n"
        "allocation 2: size 8, page 0, maybe-live-out:\n"
        "allocation 3: size 7, color 8, page 0, preallocated-temp:\n"
        "allocation 4: size 3000, page 0, preallocated-temp:\n"
    )
    assert hlo.read_buffer_sizes(str(tmp_path)) == {}
    (tmp_path / f"{module}.f.after_optimizations_after_buffer_assignment.txt").write_text("")
    assert hlo.read_buffer_sizes(str(tmp_path)) == {
        "arguments": 140.0,
        "outputs": 48.0,
        "donated": 40.0,
        "temporaries": 3000.0,
    }
