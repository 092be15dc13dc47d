"""Options of transforms and quantizers that single sources name: outlier channels, grids of o's input, real zero points,
activation groups, transforms in the model's type, factors learned inside the precision parts."""

import dataclasses

import pytest
import torch

from ptqbench.engine.bases import compute_bases
from ptqbench.errors import ConfigError, NumericalError
from ptqbench.methods.basis import FoldedBasis
from ptqbench.models.capture import read_moments
from ptqbench.models.quantized import QuantizedLinear
from ptqbench.numerics.activation import ActivationGrid, apply_grid, fake_quantize
from ptqbench.numerics.subspace import selection_basis
from transforms_at_hand import SHAPE, WINDOWS, cell, in_basis, logits, member, open_model, shape

F64 = torch.float64
OUTLIER = {"objective": "outlier", "granularity": "per_layer"}


# --- outlier channels --------------------------------------------------------------------------------------------------


def test_selection_basis_is_a_permutation_by_importance():
    importance = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 5.0]])
    basis = selection_basis(importance)
    rows = torch.tensor([10.0, 20.0, 30.0], dtype=F64)
    assert (rows @ basis).tolist() == [[20, 30, 10], [10, 20, 30]]
    assert torch.equal(basis.mT @ basis, torch.eye(3, dtype=F64).expand(2, 3, 3))
    with pytest.raises(NumericalError, match="finite"):
        selection_basis(importance * float("inf"))


@pytest.mark.parametrize(
    ("norm", "size", "kept"),
    [("linf", lambda tokens: tokens.amax(0), "largest"), ("l1", lambda tokens: tokens.sum(0), "mean_abs")],
    ids=["linf", "l1"],
)
def test_high_parts_hold_the_largest_channels(checkpoint, tmp_path, norm, size, kept):
    model = open_model(checkpoint("qwen2", hidden_size=64))
    transform = member("subspace", **OUTLIER, outlier_norm=norm)
    basis = in_basis(model, transform, cell(), tmp_path / "bases").basis
    folded = model.reopened(FoldedBasis(), torch.float32)
    with folded.block(0) as block:
        seen = []
        block.mlp.up_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1).double()))
        moments, _ = read_moments(
            block, list(folded.embed(WINDOWS).split(1)), folded.positions(WINDOWS.shape[1]), torch.device("cpu")
        )
    tokens = torch.cat(seen).abs()
    top = set(size(tokens).argsort()[-8:].tolist())
    found = basis.mlp_basis(0)
    assert torch.equal(found, found.round()), "nothing is rotated"
    assert set(found[:, -8:].argmax(0).tolist()) == top
    heads = getattr(moments, kept)["value"]
    for head in range(2):
        assert basis.value_basis(0)[head][:, -1].argmax() == heads[head].argmax()
        assert int(basis.key_basis(0)[head].sum()) == 16


def test_the_two_norms_select_differently_and_nothing_is_stored_for_a_permutation(checkpoint, tmp_path):
    model = open_model(checkpoint())
    bases = [
        compute_bases(member("subspace", **OUTLIER, outlier_norm=norm), model, WINDOWS, cell(), tmp_path / norm, "x")
        for norm in ("linf", "l1")
    ]
    assert any(not torch.equal(bases[0][name], bases[1][name]) for name in bases[0])
    stored = member("subspace", **OUTLIER).precision(cell(), SHAPE).storage_bits()
    assert stored.basis_change_w_bits == 0
    assert stored.nominal_w_bits == 4.5


# --- grids of o's input --------------------------------------------------------------------------------------------------


def test_output_per_token_shares_a_grid_between_the_parts_of_all_heads():
    per_head, per_token = (
        member("subspace", output_group=group).precision(cell(), SHAPE).block_plan().inputs["self_attn.o_proj"]
        for group in ("head", "token")
    )
    assert (per_head.n_groups, per_head.grid.n_high, per_head.online) == (4, 2, None)
    assert (per_token.n_groups, per_token.grid.n_high, per_token.order) == (1, 8, None)
    assert per_token.grid.range_contains_zero
    linear = torch.nn.Linear(64, 48, bias=False)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    found = QuantizedLinear(linear, per_token).prepare(x)
    ordered = x[:, per_head.order]
    expected = torch.cat([fake_quantize(ordered[:, :56], 4), fake_quantize(ordered[:, 56:], 8)], dim=1)
    assert torch.equal(found, expected)
    assert not torch.equal(found, QuantizedLinear(linear, per_head).prepare(x))


def test_output_per_token_changes_the_quantized_model_alone(checkpoint, tmp_path):
    model = open_model(checkpoint(), torch.float32)
    found = {
        group: in_basis(model, member("subspace", output_group=group), cell(), tmp_path / group)
        for group in ("head", "token")
    }
    exact = [logits(rotated, quantizers=False) for rotated in found.values()]
    assert torch.allclose(*exact, atol=1e-5)
    assert not torch.allclose(*(logits(rotated) for rotated in found.values()), atol=1e-3)


# --- real zero points ----------------------------------------------------------------------------------------------------


def test_real_zero_points_subtract_the_minimum():
    x = torch.randn(7, 12, dtype=F64, generator=torch.Generator().manual_seed(0)) + 0.3
    for contains in (True, False):
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        low, high = (low.clamp(max=0), high.clamp(min=0)) if contains else (low, high)
        scale = (high - low) / 15
        expected = ((x - low) / scale).round() * scale + low
        found = fake_quantize(x, 4, range_contains_zero=contains, zero_point="real")
        assert torch.allclose(found, expected, atol=1e-12)
        assert torch.allclose(found.amax(1), x.amax(1), atol=1e-12), "both ends are exact"
        assert ((found - x).abs() <= scale / 2 * (1 + 1e-9)).all()
    assert not torch.equal(found, fake_quantize(x, 4, range_contains_zero=False))
    assert torch.equal(fake_quantize(0 * x, 4, zero_point="real"), 0 * x)
    constant = torch.full((1, 4), 0.7, dtype=F64)
    assert torch.allclose(fake_quantize(constant, 4, range_contains_zero=False, zero_point="real"), constant)


def test_real_zero_points_reach_every_asymmetric_quantizer():
    plan = member("subspace", granularity="per_layer").precision(cell(zero_point="real"), SHAPE).block_plan(
        {}, torch.zeros(2, 16, 16), (torch.eye(48), None)
    )  # fmt: skip
    grids = [input_plan.grid for input_plan in plan.inputs.values()]
    grids += [plan.kv.key_grid, plan.kv.value_grid, plan.basis_changes[0].grid]
    assert {grid.zero_point for grid in grids} == {"real"}
    mixed = member("hadamard").precision(cell(zero_point="real", symmetric=True), SHAPE).block_plan()
    assert mixed.inputs["mlp.up_proj"].grid.zero_point == "integer"
    assert mixed.kv.key_grid.zero_point == "real"
    with pytest.raises(ConfigError, match="asymmetric"):
        cell(zero_point="real", symmetric=True, kv_symmetric=True)
    with pytest.raises(ConfigError, match="real on an asymmetric grid"):
        ActivationGrid(4, symmetric=True, zero_point="real")


# --- activation groups ---------------------------------------------------------------------------------------------------


def test_activation_groups_have_a_grid_each():
    precision = member("none").precision(cell(group_size=16), shape(intermediate_size=72))
    assert precision.skip_reason() is None
    plan = precision.block_plan()
    up, output, down = (plan.inputs[name] for name in ("mlp.up_proj", "self_attn.o_proj", "mlp.down_proj"))
    # 16 does not divide 72: as many groups as the hidden size of 48 has, 24 channels each (QuaRot code).
    assert [(p.n_groups, p.grid.range_contains_zero) for p in (up, output, down)] == [
        (3, False),
        (4, False),
        (3, False),
    ]
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([fake_quantize(part, 4, range_contains_zero=False) for part in x.split(16, dim=1)], dim=1)
    assert torch.equal(apply_grid(x, up.grid, up.n_groups), expected)
    plain = member("none").precision(cell(), SHAPE).block_plan().inputs["mlp.up_proj"]
    assert (plain.n_groups, plain.grid.range_contains_zero) == (1, True)


def test_activation_groups_that_do_not_fit_are_skipped():
    grouped = cell(group_size=20)
    assert "does not divide the 48 input channels" in member("none").skip_reason(grouped, SHAPE)
    assert "does not divide the 48" in member("hadamard").skip_reason(grouped, SHAPE)
    fits = cell(group_size=16)
    assert "76 input channels of mlp.down_proj" in member("none").skip_reason(fits, SHAPE)
    assert "precision parts" in member("subspace").skip_reason(fits, shape(intermediate_size=96))
    assert member("hadamard").skip_reason(fits, shape(intermediate_size=96)) is None
    assert member("none").skip_reason(cell(a=16, group_size=20), SHAPE) is None


# --- online transforms in the model's type ---------------------------------------------------------------------------------


def test_online_transforms_in_the_type_of_the_model(checkpoint, tmp_path):
    model = open_model(checkpoint(), torch.bfloat16)
    spec = cell(16, 16, 16, 16)
    bases = {
        kind: member("hadamard", online_dtype=kind).basis(spec, model.architecture) for kind in ("float32", "model")
    }
    x = torch.randn(5, 76, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours, theirs = (basis.plan(0).inputs["mlp.down_proj"].online(x) for basis in bases.values())
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert not torch.equal(ours, theirs)
    assert torch.allclose(ours, theirs, atol=0.1)
    tensors = model.tensors(0)
    assert all(
        torch.equal(a, bases["model"].block(tensors, 0)[n]) for n, a in bases["float32"].block(tensors, 0).items()
    )
    wide = open_model(checkpoint(), torch.float32)
    assert torch.equal(*(logits(wide.reopened(basis)) for basis in bases.values())), "no effect on a float32 model"


# --- factors learned inside the precision parts -----------------------------------------------------------------------------


def test_learning_inside_the_parts_keeps_the_parts(checkpoint, tmp_path):
    model = open_model(checkpoint())
    plain = in_basis(model, member("subspace"), cell(), tmp_path / "plain").basis
    transform = member("subspace", learned_rotation=True, learning_steps=3)
    learned = in_basis(model, transform, cell(), tmp_path / "learned").basis
    start = dataclasses.replace(transform, learning_steps=1).start(model.architecture)
    assert torch.allclose(
        torch.block_diag(start["rotation.residual_1"], start["rotation.residual_2"]), plain.residual_rotation
    )
    for before, after, n_high in (
        (plain.attention_basis(0), learned.attention_basis(0), 6),
        (plain.value_basis(0)[0], learned.value_basis(0)[0], 2),
    ):
        assert not torch.allclose(before, after, atol=1e-3)
        spans = [part[:, -n_high:] @ part[:, -n_high:].T for part in (before, after)]
        assert torch.allclose(*spans, atol=1e-10), "only the parts are turned"
        assert torch.allclose(after.T @ after, torch.eye(len(after), dtype=F64), atol=1e-11)
    assert not torch.allclose(learned.head_rotation[0], learned.head_rotation[1], atol=1e-4)
    reason = transform.skip_reason(cell(4, 16, 16, 16), SHAPE)
    assert "loss does not depend on them" in reason
