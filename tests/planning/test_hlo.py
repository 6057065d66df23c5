"""Totals of programs: of a small text with known numbers, and of compiled CPU programs."""

import jax
import jax.numpy as jnp
import pytest

from cptjax import sharding
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


def test_sizes_are_read_where_the_compiler_has_written_them(tmp_path):
    assert hlo.read_buffer_sizes(str(tmp_path)) == {}
    (tmp_path / "module_0000.f.after_optimizations-buffer-assignment.txt").write_text(
        "allocation 0: size 100, page 0, parameter 0, shape |f32[25]| at ShapeIndex {}:\n"
        "allocation 1: size 40, page 0, parameter 1, shape |f32[10]| at ShapeIndex {}, maybe-live-out:\n"
        "allocation 2: size 8, page 0, maybe-live-out:\n"
        "allocation 3: size 7, color 8, page 0, preallocated-temp:\n"
        "allocation 4: size 3000, page 0, preallocated-temp:\n"
    )
    assert hlo.read_buffer_sizes(str(tmp_path)) == {}
    (tmp_path / "module_0000.f.after_optimizations_after_buffer_assignment.txt").write_text("")
    assert hlo.read_buffer_sizes(str(tmp_path)) == {
        "arguments": 140.0,
        "outputs": 48.0,
        "donated": 40.0,
        "temporaries": 3000.0,
    }
