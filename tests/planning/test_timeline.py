"""Seconds of scheduled programs: texts whose instructions take known times on a made-up chip."""

import pytest

from cptjax import sharding
from cptjax.common.chips import Chip
from cptjax.planning import timeline

# A second is 2,000 operations, 100 bytes of memory, or 100 bytes on one link.
CHIP = Chip("test", memory=1e9, flops=2000.0, bandwidth=100.0, link=100.0, dcn=10.0)
GROUPS = "replica_groups={{0,2,4,6},{1,3,5,7}}"  # of fsdp


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(1, 4, 2)


def seconds(mesh, *lines, before=""):
    """Return the seconds of a program with parameters b [25] and c [25] in float32.

    before: other computations. PRODUCT stands for a product that takes a second of arithmetic and no main memory.
    """
    shape = "f32[10,10]{1,0:S(1)}"
    product = f"{shape} convolution(%fast, %fast), dim_labels=bf_io->bf"
    body = "\n".join(f"  {line}" for line in lines).replace("PRODUCT", product)
    text = (
        "ENTRY %main (a: f32[10,10], b: f32[25], c: f32[25]) -> f32[] {\n"
        f"  %fast = {shape} parameter(0)\n"
        "  %b = f32[25]{0} parameter(1)\n"
        "  %c = f32[25]{0} parameter(2)\n"
        "  %x = f32[100]{0:S(1)} parameter(3)\n"
        f"{body}\n}}\n"
    )
    return timeline.scheduled_seconds(before + text, mesh, CHIP)


def test_instructions_run_one_after_the_other_each_as_fast_as_its_slowest_resource(mesh):
    """A product: 2,000 operations; a sum: 300 bytes; no overlap of the two."""
    assert seconds(mesh, "%p = PRODUCT", "%s = f32[25]{0} add(%b, %c)") == pytest.approx(1 + 3)


def test_a_copy_runs_beside_the_instructions_between_its_start_and_its_end(mesh):
    """It reads 100 bytes: hidden behind one product, waited for without one."""
    start = "%t = (f32[25]{0}, f32[25]{0:S(1)}, u32[]{:S(2)}) copy-start(%b)"
    end = "%d = f32[25]{0:S(1)} copy-done(%t)"
    assert seconds(mesh, start, "%p = PRODUCT", end) == pytest.approx(1)
    assert seconds(mesh, start, end, "%p = PRODUCT") == pytest.approx(2)
    more = start.replace("%t", "%t2")
    assert seconds(mesh, start, more, "%p = PRODUCT", end) == pytest.approx(2)  # both are read
    reads = "%s = f32[25]{0:S(1)} negate(%c)"  # 100 bytes too, of the same memory
    assert seconds(mesh, start, reads, end) == pytest.approx(2)


def test_a_transfer_that_the_next_instruction_needs_adds_its_time(mesh):
    """An all-reduce of 400 bytes among 4 sends 600 bytes over two links: 3 seconds."""
    shape = "f32[100]{0:S(1)}"
    one = f"%r = {shape} all-reduce(%x), {GROUPS}"
    assert seconds(mesh, "%p = PRODUCT", one, "%q = PRODUCT") == pytest.approx(1 + 3 + 1)
    start = f"%t = {shape} all-reduce-start(%x), {GROUPS}"
    end = f"%d = {shape} all-reduce-done(%t)"
    assert seconds(mesh, start, "%p = PRODUCT", "%q = PRODUCT", end) == pytest.approx(3)


def test_a_transfer_of_a_sparse_core_begins_when_it_gets_its_data(mesh):
    """Its start has no operand. The all-reduce takes 3 seconds, each product one."""
    shape = "f32[100]{0:S(1)}"
    called = (
        f"%sum (x: f32[100]) -> f32[100] {{\n  %x = {shape} parameter(0)\n"
        f"  ROOT %r = {shape} all-reduce(%x), {GROUPS}\n}}\n\n"
    )
    data = f"%x = {shape} negate(%fast)"
    start = "%t = ((), (), u32[]{:S(2)}) async-start(), calls=%sum"
    update = f"%u = (({shape}), {shape}, u32[]{{:S(2)}}) async-update(%t, %x)"
    end = f"%d = {shape} async-done(%u)"
    late = seconds(mesh, start, "%p = PRODUCT", data, update, "%q = PRODUCT", end, before=called)
    assert late == pytest.approx(1 + 3)
    early = seconds(mesh, start, data, update, "%p = PRODUCT", "%q = PRODUCT", end, before=called)
    assert early == pytest.approx(3)


def test_permutations_in_both_directions_use_different_links(mesh):
    """Each sends 100 bytes to a neighbour, and its counters, which are of no weight."""

    def start(name, pairs):
        shape = "f32[25]{0:S(1)}"
        return (
            f"%{name} = ({shape}, {shape}, u32[], u32[]) collective-permute-start(%x), "
            f"source_target_pairs={{{pairs}}}"
        )

    forwards, backwards = "{0,2},{2,4},{4,6},{6,0}", "{2,0},{4,2},{6,4},{0,6}"
    ends = [f"%d{n} = f32[25]{{0:S(1)}} collective-permute-done(%{n})" for n in "mn"]
    assert seconds(mesh, start("m", forwards), start("n", backwards), *ends) == pytest.approx(
        1, 0.05
    )
    assert seconds(mesh, start("m", forwards), start("n", forwards), *ends) == pytest.approx(
        2, 0.05
    )


def test_loops_and_conditionals_take_the_time_of_their_bodies(mesh):
    text = """\
%body (p: f32[25]) -> f32[25] {
  %p = f32[25]{0} parameter(0)
  ROOT %n = f32[25]{0} negate(%p)
}

%nothing (q: f32[25]) -> f32[25] {
  ROOT %q = f32[25]{0} parameter(0)
}

ENTRY %main (a: f32[25], i: s32[]) -> f32[25] {
  %a = f32[25]{0} parameter(0)
  %i = s32[] parameter(1)
  %w = f32[25]{0} while(%a), condition=%nothing, body=%body KNOWN
  ROOT %c = f32[25]{0} conditional(%i, %w, %w), branch_computations={%nothing, %body}
}
"""
    known = text.replace("KNOWN", ', backend_config={"known_trip_count":{"n":"5"}}')
    computed = text.replace("KNOWN", "")
    branch = 2 / 2  # one of two branches takes 2 seconds
    assert timeline.scheduled_seconds(known, mesh, CHIP) == pytest.approx(5 * 2 + branch)
    found = timeline.scheduled_seconds(computed, mesh, CHIP, dynamic=7)
    assert found == pytest.approx(7 * 2 + branch)


def test_transfers_within_a_slice_run_beside_those_between_slices():
    """Two slices, data=4: 40 bytes to the other slice take 4 seconds, 400 within one take 2."""
    mesh = sharding.make_mesh(4, 2, 1)
    text = (
        "ENTRY %main (a: f32[10], b: f32[100]) -> f32[] {\n"
        "  %a = f32[10]{0:S(1)} parameter(0)\n"
        "  %b = f32[100]{0:S(1)} parameter(1)\n"
        "  %s = f32[10]{0:S(1)} all-reduce-start(%a), replica_groups={{0,4},{1,5},{2,6},{3,7}}\n"
        "  %t = f32[100]{0:S(1)} all-reduce(%b), replica_groups={{0,2},{1,3},{4,6},{5,7}}\n"
        "  %d = f32[10]{0:S(1)} all-reduce-done(%s)\n}\n"
    )
    assert timeline.scheduled_seconds(text, mesh, CHIP, slices=2) == pytest.approx(4)
    alone = "\n".join(line for line in text.splitlines() if "%s)" not in line and "%s " not in line)
    assert timeline.scheduled_seconds(alone, mesh, CHIP, slices=2) == pytest.approx(2)
