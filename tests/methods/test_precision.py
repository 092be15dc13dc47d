"""Which parts of a block get how many bits, and what a model then stores."""

import pytest
import torch

from ptqbench.cell.registry import complete
from ptqbench.errors import ConfigError, UnsupportedError
from ptqbench.models.architecture import published
from transforms_at_hand import LINEARS, SHAPE, cell, member, ranges, shape


def test_weight_grids_split_by_importance():
    precision = member("subspace").precision(cell(), SHAPE)
    for name in ("qkv", "gate_up", *LINEARS[:3], *LINEARS[4:6]):
        assert ranges(precision, name) == [(0, 42, 4), (42, 48, 8)]
    assert ranges(precision, "o") == ranges(precision, "self_attn.o_proj") == [(0, 56, 4), (56, 64, 8)]
    assert ranges(precision, "down") == [(0, 76, 4)]
    assert all(part.spec.clip_search and part.spec.scheme == "sym_signed" for part in precision.weight_grid("qkv"))
    grouped = member("hadamard").precision(cell(weight_groups=12), SHAPE).weight_grid("down")
    assert [part.spec.group_size for part in grouped] == [12]
    with pytest.raises(ConfigError, match="lm_head"):
        precision.weight_grid("lm_head")


@pytest.mark.parametrize(
    ("options", "bits", "expected"),
    [
        ({"high_fraction": 0.0}, 4, [(0, 48, 4)]),
        ({"high_fraction": 1.0}, 4, [(0, 48, 8)]),
        ({"high_bits": 4}, 4, [(0, 42, 4), (42, 48, 4)]),
        ({}, 16, [(0, 42, 16), (42, 48, 16)]),
        ({"iso_bits": True, "high_bits": 6}, 4, [(0, 6, 2), (6, 42, 4), (42, 48, 6)]),
    ],
)
def test_weight_grid_limits(options, bits, expected):
    assert ranges(member("subspace", **options).precision(cell(w=bits), SHAPE), "qkv") == expected


def test_the_lowest_part_is_asymmetric_except_with_rounding_to_nearest():
    schemes = lambda solver: [
        part.spec.scheme
        for part in member("subspace", iso_bits=True, high_bits=6)
        .precision(cell(solver=solver), SHAPE)
        .weight_grid("o")
    ]
    assert schemes("gptq") == ["asym", "sym_signed", "sym_signed"]
    assert schemes("rtn") == ["sym_signed"] * 3


def test_ranges_of_inputs_and_keys_contain_zero_unless_the_cell_says_otherwise():
    plan = lambda **options: member("none").precision(cell(**options), SHAPE).block_plan()
    for contains in (True, False):
        found = plan(range_contains_zero=contains)
        assert {item.grid.range_contains_zero for item in found.inputs.values()} == {contains}
        assert found.kv.key_grid.range_contains_zero == contains
        assert not found.kv.value_grid.range_contains_zero


def test_subspace_plan_follows_the_codes():
    plan = member("subspace", granularity="per_layer").precision(cell(), SHAPE).block_plan(
        {"mlp.down_proj": torch.neg}, torch.zeros(2, 16, 16), (torch.eye(48), None)
    )  # fmt: skip
    general, output, down = (plan.inputs[name] for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"))
    assert (general.grid.bits, general.grid.high_bits, general.grid.n_high, general.n_groups) == (4, 8, 6, 1)
    assert general.grid.range_contains_zero
    assert general.order is None
    assert (output.grid.bits, output.grid.high_bits, output.grid.n_high, output.n_groups) == (4, 8, 2, 4)
    assert not output.grid.range_contains_zero
    assert output.order[:3].tolist() == [0, 1, 2]
    assert output.order[-8:].tolist() == [14, 15, 30, 31, 46, 47, 62, 63]
    assert (down.grid.bits, down.grid.n_high, down.grid.range_contains_zero, down.online) == (4, 0, True, torch.neg)
    key, value = plan.kv.key_grid, plan.kv.value_grid
    assert (key.bits, key.high_bits, key.n_high, key.range_contains_zero) == (4, 8, 2, True)
    assert (value.bits, value.high_bits, value.n_high, value.range_contains_zero) == (4, 8, 2, False)
    assert (plan.kv.rotation_bits, plan.kv.rope_output_bits) == (8, 8)
    first, second = plan.basis_changes
    assert second is None
    assert (first.grid.bits, first.grid.n_high, first.grid.range_contains_zero) == (8, 0, True)


@pytest.mark.parametrize(
    ("bits", "inputs", "key", "value", "change"),
    [((16, 16, 16), False, False, False, False), ((4, 16, 16), True, False, False, True),
     ((16, 4, 16), False, True, False, False), ((16, 16, 4), False, False, True, True)],
)  # fmt: skip
def test_each_bitwidth_installs_its_own_quantizers(bits, inputs, key, value, change):
    a, k, v = bits
    precision = member("subspace").precision(cell(4, a, k, v), SHAPE)
    plan = precision.block_plan({}, torch.zeros(2, 16, 16), (torch.eye(48), None))
    assert (plan.inputs["self_attn.o_proj"].grid is not None) == inputs
    assert plan.inputs["self_attn.o_proj"].order is not None, "columns of o are reordered whatever the bits"
    assert ("mlp.up_proj" in plan.inputs) == inputs
    assert (plan.kv is not None) == (key or value)
    if plan.kv is not None:
        assert (plan.kv.rotation is not None) == (plan.kv.key_grid is not None) == key
        assert (plan.kv.value_grid is not None) == value
    assert (plan.basis_changes[0].grid is not None) == change


@pytest.mark.parametrize("name", ["none", "hadamard"])
def test_uniform_transforms_quantize_per_token_and_per_head(name):
    options = dict(symmetric=True, clip_ratio=0.9, kv_clip_ratio=0.95, k_group="token")
    precision = member(name).precision(cell(4, 5, 6, 7, **options), SHAPE)
    plan = precision.block_plan()
    assert set(plan.inputs) == set(LINEARS)
    for input_plan in plan.inputs.values():
        grid = input_plan.grid
        assert (grid.bits, grid.symmetric, grid.clip_ratio, grid.n_high, input_plan.n_groups) == (5, True, 0.9, 0, 1)
        assert input_plan.order is None
    key, value = plan.kv.key_grid, plan.kv.value_grid
    assert (key.bits, key.symmetric, key.clip_ratio, key.range_contains_zero) == (6, False, 0.95, True)
    assert (value.bits, value.symmetric, value.clip_ratio, value.range_contains_zero) == (7, False, 0.95, False)
    assert (plan.kv.k_group, plan.kv.rotation_bits, plan.kv.rope_output_bits) == ("token", 16, 16)
    assert ranges(precision, "o") == [(0, 64, 4)]


@pytest.mark.parametrize("name", ["none", "hadamard", "learned_rotation"])
def test_the_input_of_o_is_quantized_per_head_where_asked_and_is_left_out_of_groups(name):
    transform = member(name, output_group="head")
    plan = transform.precision(cell(4, 5), SHAPE).block_plan()
    assert {linear: one.n_groups for linear, one in plan.inputs.items() if one.n_groups > 1} == {"self_attn.o_proj": 4}
    output = plan.inputs["self_attn.o_proj"]
    assert (output.grid.bits, output.grid.range_contains_zero, output.order) == (5, False, None)
    assert (
        transform.precision(cell(4, 5), SHAPE).storage_bits()
        == member(name).precision(cell(4, 5), SHAPE).storage_bits()
    )
    assert "grouped by head" in transform.skip_reason(cell(4, 5, group_size=16), SHAPE)


def test_keys_alone_are_rotated_where_they_are_quantized():
    transform = member("none", r3=True)
    assert transform.basis(cell(4, 16, 16, 16), SHAPE) is None
    rotation = transform.basis(cell(16, 16, 4, 16), SHAPE).plan(1).kv.rotation
    torch.testing.assert_close(rotation, member("hadamard").basis(cell(), SHAPE).plan(1).kv.rotation)
    assert "power of two" in transform.skip_reason(cell(), shape(head_dim=24))
    assert transform.skip_reason(cell(k=16), shape(head_dim=24)) is None


@pytest.mark.parametrize(
    ("name", "given"),
    [("none", {"r3": False, "output_group": "token"}), ("hadamard", {"output_group": "token"}),
     ("learned_rotation", {"output_group": "token"})],
)  # fmt: skip
def test_new_options_at_their_defaults_are_no_part_of_the_identity(name, given):
    assert complete("transform", {"name": name, **given}).options == complete("transform", {"name": name}).options
    assert not set(given) & set(complete("transform", {"name": name, **given}).options)


@pytest.mark.parametrize("name", ["hadamard", "subspace"])
def test_int8_down_proj(name):
    precision = member(name, int8_down_proj=True).precision(cell(), SHAPE)
    assert ranges(precision, "down") == [(0, 76, 8)]
    assert precision.block_plan().inputs["mlp.down_proj"].grid.bits == 8
    untouched = member(name, int8_down_proj=True).precision(cell(16, 16), SHAPE)
    assert ranges(untouched, "down") == [(0, 76, 16)]


def test_online_transforms_are_installed_where_they_belong():
    plan = member("hadamard").basis(cell(16, 16, 16, 16), SHAPE).plan(0)
    assert set(plan.inputs) == {"self_attn.o_proj", "mlp.down_proj"}
    assert plan.kv is None
    fused = member("hadamard", head_mix="none", r4=False).basis(cell(16, 16, 16, 16), SHAPE)
    assert fused.plan(0) is None
    assert member("hadamard").basis(cell(16, 16, 4, 16), SHAPE).plan(0).kv.rotation.shape == (2, 16, 16)
    assert member("hadamard", r3=False).basis(cell(16, 16, 4, 16), SHAPE).plan(0).kv.rotation is None


@pytest.mark.parametrize(
    ("model", "codes", "with_changes"),
    [
        ("llama-3.2-1b", 4.362, 6.57),
        ("llama-3.2-3b", 4.375, 7.38),
        ("llama-3-8b", 4.365, 6.83),
        ("qwen2.5-7b", 4.354, 6.12),
    ],
)
def test_golden_storage_bits(model, codes, with_changes):
    shape = published()[model]
    shared = member("subspace").precision(cell(), shape).storage_bits()
    assert shared.nominal_w_bits == 4.5
    assert shared.code_w_bits == pytest.approx(codes, abs=5e-4)
    assert shared.basis_change_w_bits == 0
    assert shared.code_w_bits < shared.effective_w_bits < shared.code_w_bits + 0.05, (
        "scales of one grid per row and part"
    )
    per_layer = member("subspace", granularity="per_layer").precision(cell(), shape).storage_bits()
    assert per_layer.code_w_bits + per_layer.basis_change_w_bits == pytest.approx(with_changes, abs=5.1e-3)
    assert per_layer.effective_w_bits == pytest.approx(shared.effective_w_bits + per_layer.basis_change_w_bits)
    once = member("subspace", granularity="one_per_decoder").precision(cell(), shape).storage_bits()
    assert once.basis_change_w_bits == pytest.approx(per_layer.basis_change_w_bits / 2)
    # A scale of 16 bits per output channel; without rounded weights the matrices stay as they are.
    options = {"granularity": "per_layer", "basis_change_weight_bits": 8}
    eight, untouched = (member("subspace", **options).precision(cell(w), shape).storage_bits() for w in (4, 16))
    share = (8 + 16 / shape.hidden_size) / 16
    assert eight.basis_change_w_bits == pytest.approx(per_layer.basis_change_w_bits * share)
    assert untouched.basis_change_w_bits == per_layer.basis_change_w_bits


@pytest.mark.parametrize("w", [4, 16])
def test_basis_changes_are_rounded_where_weights_are(w):
    precision = member("subspace", granularity="per_layer", basis_change_weight_bits=8, basis_change_bits=16).precision(
        cell(w), SHAPE
    )
    for change in precision.block_plan({}, torch.zeros(2, 16, 16), (torch.eye(48), torch.eye(48))).basis_changes:
        assert (change.grid, change.matrix_bits) == (None, 8 if w == 4 else 16)


@pytest.mark.parametrize(
    ("model", "codes"),
    [
        ("llama-3.2-1b", 4.362),
        ("llama-3.2-3b", 4.375),
        ("llama-3-8b", 4.365),
        ("qwen2.5-0.5b", 4.354),
        ("qwen2.5-7b", 4.354),
    ],
)
def test_golden_code_bits(model, codes):
    assert member("subspace").precision(cell(), published()[model]).storage_bits().code_w_bits == pytest.approx(
        codes, abs=5e-4
    )


def test_code_bits_limits():
    shape = published()["qwen3-0.6b"]  # H e = 2048 differs from d = 1024
    assert (shape.hidden_size, shape.q_dim) == (1024, 2048)

    def code_bits(**options):
        return member("subspace", **options).precision(cell(), shape).storage_bits().code_w_bits

    counts = {name: rows * columns for name, (rows, columns) in shape.linear_shapes().items()}
    share = counts["mlp.down_proj"] / sum(counts.values())
    assert code_bits(high_fraction=0.0) == 4
    assert code_bits(high_bits=4) == 4
    assert code_bits(high_fraction=1.0) == pytest.approx(8 - 4 * share)
    assert code_bits() == pytest.approx(4.5 - 0.5 * share)
    assert code_bits(high_fraction=0.0, int8_down_proj=True) == pytest.approx(4 + 4 * share)


def test_golden_nominal_bits():
    def nominal(**options):
        return member("subspace", **options).precision(cell(), published()["llama-3-8b"]).storage_bits().nominal_w_bits

    assert nominal() == 4.5
    assert nominal(iso_bits=True, high_bits=6) == 4.0
    assert (nominal(high_fraction=0.0), nominal(high_fraction=1.0)) == (4, 8)


def test_iso_split():
    layout = member("subspace", iso_bits=True, high_bits=6).layout()
    assert layout.parts(64) == (8, 48, 8)
    assert layout.parts(12) == (1, 10, 1)
    with pytest.raises(UnsupportedError):
        layout.parts(7)


def test_golden_cache_bits():
    small, large = published()["llama-3.2-1b"], published()["llama-3-8b"]  # head_dim 64 and 128
    assert member("subspace").precision(cell(), small).storage_bits().k_bits == 4.5 + 1.0
    assert member("subspace").precision(cell(), large).storage_bits().v_bits == 4.5 + 0.5
    assert member("hadamard").precision(cell(), large).storage_bits().k_bits == 4 + 32 / 128
    assert member("hadamard").precision(cell(kv_symmetric=True), large).storage_bits().k_bits == 4 + 16 / 128
    token = member("hadamard").precision(cell(k_group="token"), large).storage_bits()
    assert (token.k_bits, token.v_bits) == (4 + 32 / 1024, 4 + 32 / 128)
    assert member("none").precision(cell(4, 16, 16, 16), large).storage_bits().k_bits == 16
    assert member("subspace", iso_bits=True, high_bits=6).precision(cell(), large).storage_bits().nominal_w_bits == 4
