"""Formats of a bitwidth with methods: what is refused, which parts have which format, what is stored."""

from __future__ import annotations

import pytest

from ptqbench.cell import formats as names
from ptqbench.cell.folders import group_names
from ptqbench.cell.labels import bits_name, says_other_bits
from ptqbench.cell.spec import BitwidthSpec
from ptqbench.engine.cost import observes
from ptqbench.errors import ConfigError
from ptqbench.numerics.formats import FORMATS
from ptqbench.sweeps.compose import compose_cell
from ptqbench.sweeps.resolve import skip_reason
from transforms_at_hand import SHAPE, member

FILES = [
    "fp8", "fp8_dynamic", "fp8a16", "mxfp4", "mxfp4a16", "mxfp4a8", "mxfp6a8", "mxfp8", "mxint8", "nvfp4", "nvfp4_kvfp8",
    "nvfp4_kvnvfp4", "nvfp4a16",
]  # fmt: skip


def composed(*words):
    return compose_cell(["model=tiny", *words])


def test_both_lists_of_formats_agree():
    assert {name: form.elements.bits for name, form in FORMATS.items()} == names.BITS
    assert set(names.FormatName.__args__) == {names.INTEGER, *names.BITS}


@pytest.mark.parametrize("file", FILES)
def test_every_file_is_named_by_its_values(file):
    assert file in group_names("bitwidth")
    bits = composed("method=rtn", f"bitwidth={file}").bitwidth
    assert bits.name == file
    by_values = {"fp8_dynamic": "fp8_row", "mxint8": "mxint8_floor"}
    assert bits_name(bits) == by_values.get(file, file)
    assert not says_other_bits(bits)


def test_formats_leave_the_names_of_integers_alone():
    label = composed("method=rtn", "bitwidth=mxfp4", "bitwidth.mx_scale=floor").bitwidth.name
    assert label == "mxfp4_floor"
    cell = composed("method=rtn", "bitwidth=w4a4", "++bitwidth.a_format=nvfp4", "++bitwidth.nv_input_scale=token")
    assert cell.bitwidth.name == "w4_anvfp4_token"
    assert says_other_bits(
        BitwidthSpec(name="w4a4", w_bits=4, a_bits=4, k_bits=16, v_bits=16, w_format="mxfp4", a_format="mxfp4")
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bitwidth=mxfp4", "bitwidth.a_bits=16"], "bitwidth.a_format=mxfp4 has 4 bits, got bitwidth.a_bits=16"),
        (["bitwidth=nvfp4a16", "bitwidth.w_bits=3"], "bitwidth.w_format=nvfp4 has 4 bits, got bitwidth.w_bits=3"),
        (["bitwidth=nvfp4_kvfp8", "bitwidth.v_bits=4"], "bitwidth.kv_format=fp8 has 8 bits, got bitwidth.v_bits=4"),
        (["bitwidth=mxfp4", "bitwidth.group_size=64"], "group_size=64 is for integers: mxfp4 has blocks of its own; give null"),
        (["bitwidth=nvfp4", "++bitwidth.mx_scale=floor"], "mx_scale=floor is for formats with power-of-two scales"),
        (["bitwidth=mxfp4a8", "bitwidth.mx_scale=four_thirds"], "four_thirds is for mxfp4 alone, got mxfp4, mxfp8"),
        (["bitwidth=nvfp4a16", "++bitwidth.nv_input_scale=token"], "nv_input_scale=token is for bitwidth.a_format=nvfp4, got int"),
        (["bitwidth=mxfp4", "bitwidth.w_format=mxfp5"], "mxfp4"),
    ],
)  # fmt: skip
def test_contradictions_are_one_line(words, said):
    with pytest.raises(ConfigError) as caught:
        composed("method=rtn", *words)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bitwidth=mxfp4a16", "method.grid.zero_point=real"], "zero_point=real is for integer grids, mxfp4 is symmetric"),
        (["bitwidth=nvfp4a16", "method/grid=asym_free_range"], "range_contains_zero=false is for integer grids"),
        (["bitwidth=mxfp8", "method.activation.group_size=32"], "group_size=32 is for integers, mxfp8 has blocks of its own"),
        (["bitwidth=nvfp4_kvfp8", "method.activation.k_group=token"], "fp8 has blocks within a head; use k_group=head"),
        (["bitwidth=nvfp4a16", "method/solver=gptq_dynamic_groups"], "act_order with dynamic groups scatters"),
        (["bitwidth=mxint8", "method/transform=subspace_activation", "method.transform.high_bits=12"], "has a part of 12 bits"),
        (["bitwidth=mxfp4", "method/transform=subspace_iso"], "a part of 2 bits beside mxfp4"),
        (["bitwidth=mxfp4", "++method.grid.scale_search=scale_sweep"], "scale_sweep is for the weight formats nvfp4, got mxfp4"),
        (["bitwidth=w4", "++method.grid.scale_search=exponent"], "exponent is for the weight formats mxfp4, mxfp6"),
        (["bitwidth=nvfp4", "++method.grid.scale_search=scale_sweep"], None),
        (["bitwidth=mxfp4"], None), (["bitwidth=nvfp4", "method/solver=gptq_act_order"], None),
        (["bitwidth=nvfp4", "method/transform=subspace_activation"], None),
        (["bitwidth=nvfp4_kvfp8", "method/transform=hadamard"], None),
        (["bitwidth=mxfp4a16", "method/grid=sym_signed"], None),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_skipped_with_its_reason(words, said):
    reason = skip_reason(composed("method=gptq", *words))
    assert reason is None if said is None else said in reason, reason


@pytest.mark.parametrize("file", FILES)
def test_identity_of_integers_is_as_before_and_formats_have_their_own(file):
    from ptqbench.cell.fingerprint import identity_fields, run_id

    integer = composed("method=rtn", "bitwidth=w4a4")
    assert set(identity_fields(integer.bitwidth)) == {"w_bits", "a_bits", "k_bits", "v_bits", "group_size"}
    assert run_id(composed("method=rtn", f"bitwidth={file}")) != run_id(integer)


def precision(transform="none", words=(), **options):
    cell = composed("method=gptq", *words)
    return member(transform, **options).precision(cell, SHAPE)


def test_parts_of_a_split_axis_have_the_format_of_their_width():
    split = precision("subspace", ["bitwidth=nvfp4_kvfp8"])
    low, high = split.weight_grid("qkv")
    assert [(part.spec.format, part.spec.bits) for part in (low, high)] == [("nvfp4", 4), ("mxfp8", 8)]
    plan = split.block_plan({}, None)
    grid = plan.inputs["self_attn.q_proj"].grid
    assert (grid.format, grid.bits, grid.high_bits) == ("nvfp4", 4, 8)
    assert (plan.kv.key_grid.format, plan.kv.key_grid.bits, plan.kv.key_grid.high_bits) == ("fp8", 8, 8)
    eight = precision("hadamard", ["bitwidth=mxfp4"], int8_down_proj=True)
    assert eight.weight_grid("down")[0].spec.format == "mxfp8"


def test_bits_that_are_stored():
    bits = precision(words=["bitwidth=nvfp4_kvfp8"]).storage_bits()
    assert (bits.nominal_w_bits, bits.code_w_bits, bits.k_bits, bits.v_bits) == (4, 4, 8, 8)
    assert 4.5 < bits.effective_w_bits < 4.6  # a number per linear, a short last block of 76 channels
    kv = precision(words=["bitwidth=nvfp4_kvnvfp4"]).storage_bits()
    assert kv.k_bits == kv.v_bits == 4.5  # heads of 16 channels
    assert precision(words=["bitwidth=mxfp4a16"]).storage_bits().k_bits == 16


@pytest.mark.parametrize(
    ("file", "found"), [("mxfp8", False), ("nvfp4", True), ("fp8", True), ("nvfp4a16", False), ("w4a4", False)]
)
def test_which_cells_look_for_the_largest_inputs_first(file, found):
    cell = composed("method=rtn", f"bitwidth={file}")
    assert observes(cell.bitwidth) == found
    assert any(plan.grid is not None and plan.grid.needs_peaks for plan in plans(cell)) == found


def plans(cell):
    plan = member("none").precision(cell, SHAPE).block_plan()
    return [] if plan is None else plan.inputs.values()
