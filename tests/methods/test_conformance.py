"""The contract of the roles, held to every target, solver and refinement. A new member is one row of `ROWS`.

Transforms are held to theirs in ``test_basis.py``: the function of the model stays.
"""

import pytest
import torch

from ptqbench.cell.registry import MEMBERS, create
from ptqbench.cell.spec import RoleSpec
from ptqbench.methods.base import Repaired, Statistic, Statistics
from ptqbench.methods.solvers import Gptq
from ptqbench.methods.targets import Weight
from ptqbench.numerics.grid import ColumnRange, code_dtype, uniform_grid
from ptqbench.numerics.grid_spec import GridSpec
from ptqbench.numerics.report import relative_output_error
from ptqbench.numerics.stored import Stored

ROWS = [
    ("target", "weight", {}),
    ("target", "loaq", {}),
    ("target", "loaq", {"level": "linear", "alpha": 0.5}),
    ("target", "qep", {}),
    ("solver", "none", {}),
    ("solver", "rtn", {}),
    ("solver", "gptq", {}),
    ("solver", "gptq", {"act_order": True}),
    ("solver", "gptaq", {}),
    ("solver", "qronos", {}),
    ("refine", "none", {}),
    ("refine", "null_space", {}),
    ("refine", "null_space", {"moment": "posavg", "solver": "adam20", "reference": "working"}),
    ("refine", "scale_refit", {}),
]
"""Role, name of the member, options."""

N_IN, N_OUT, N_TOKENS = 24, 10, 200
GRIDS = {
    "asym": uniform_grid(N_IN, GridSpec(3)),
    "groups": uniform_grid(N_IN, GridSpec(4, "sym_signed", group_size=8)),
    "mixed": (ColumnRange(0, 16, GridSpec(3)), ColumnRange(16, N_IN, GridSpec(8, "sym_signed"))),
    "mxfp4": uniform_grid(N_IN, GridSpec(4, format="mxfp4")),
    "mxint8": uniform_grid(N_IN, GridSpec(8, format="mxint8", mx_scale="floor")),
    "nvfp4": uniform_grid(N_IN, GridSpec(4, format="nvfp4")),
    "fp8": uniform_grid(N_IN, GridSpec(8, format="fp8")),
    "fp8_row": uniform_grid(N_IN, GridSpec(8, format="fp8_row")),
    "two formats": (
        ColumnRange(0, 16, GridSpec(4, format="nvfp4")),
        ColumnRange(16, N_IN, GridSpec(8, format="mxfp8")),
    ),
}


def rows(*roles):
    return [pytest.param(*row, id="-".join([*row[:2], *map(str, row[2].values())])) for row in ROWS if row[0] in roles]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT = randn(N_OUT, N_IN, seed=1)
WEIGHT[3] = 0
MIXING = randn(N_IN, N_IN, seed=2)


def statistics(needs, drift=1.0):
    """Statistics of correlated inputs with a drift, channel 5 without input: those that are needed, and no others."""
    inputs_q = randn(N_TOKENS, N_IN, seed=3) @ MIXING
    inputs = inputs_q + drift * 0.2 * randn(N_TOKENS, N_IN, seed=4) @ MIXING
    residual = drift * randn(N_TOKENS, N_OUT, seed=5)
    inputs_q[:, 5] = 0
    needs_weights = Statistic.TOKEN_WEIGHTS in needs
    tokens = (0.5 + randn(N_TOKENS, 1, seed=6).abs()) ** needs_weights
    moment = lambda left, right: left.T @ right / N_TOKENS
    return Statistics(
        second_moment=moment(inputs_q, inputs_q),
        n_tokens=N_TOKENS,
        weighted_moment=moment(tokens * inputs_q, tokens * inputs_q) if needs_weights else None,
        cross_moment=moment(tokens * inputs_q, tokens * (inputs - inputs_q))
        if Statistic.CROSS_MOMENT in needs
        else None,
        residual_moment=moment(tokens * inputs_q, tokens * residual) if Statistic.RESIDUAL_MOMENT in needs else None,
        position_moment=moment(inputs_q, inputs_q) if Statistic.POSITION_MEAN in needs else None,
        linears=("self_attn.o_proj",),
    )


def contents(*values):
    """Copies of all tensors in some dataclasses, to see that nothing was written into them."""
    parts = [part for value in values for part in vars(value).values()]
    inside = [tensor for part in parts if isinstance(part, Stored) for tensor in part.tensors().values()]
    return [plain(part).clone() for part in [*parts, *inside] if isinstance(part, torch.Tensor)]


def plain(tensor):
    """A tensor of a type that torch compares."""
    return tensor.double() if tensor.dtype == torch.float8_e4m3fn else tensor


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_every_member_has_a_row():
    assert {row[:2] for row in ROWS} == {
        (role, name) for role in MEMBERS if role != "transform" for name in MEMBERS[role]
    }


def shares_a_number(grid):
    return any(not part.spec.integer and part.spec.own_format.per_tensor for part in grid)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(("role", "name", "options"), [row for row in rows("solver") if row.values[1] != "none"])
def test_a_solver_rounds_to_its_grid(role, name, options, grid):
    solver = create(role, RoleSpec(name, options))
    found = statistics(solver.needs)
    aim = Weight().aim(WEIGHT, found)
    before = contents(aim, found)
    result = solver.solve(aim, found, grid)
    assert same(before, contents(aim, found)), "nothing that was given is written into"
    assert result.stored.codes.dtype == code_dtype(grid)
    for part in grid:
        low, high = part.spec.code_limits
        codes = plain(result.stored.codes[:, part.start : part.stop])
        assert low <= int(codes.min())
        assert int(codes.max()) <= high
    assert torch.equal(result.stored.weight(), result.dequantized)
    assert relative_output_error(WEIGHT, result.dequantized, found.second_moment) < 1
    assert not result.dequantized[3].any(), "a row of zeros stays"
    assert same(contents(result), contents(solver.solve(aim, found, grid))), "the same again gives the same bytes"
    # Rows are independent given the statistics.
    alone = solver.solve(Weight().aim(WEIGHT[4:7], found), found, grid)
    if not shares_a_number(grid):
        assert torch.equal(plain(alone.stored.codes), plain(result.stored.codes[4:7]))


@pytest.mark.parametrize(("role", "name", "options"), [row for row in rows("solver") if row.values[1] != "none"])
def test_a_solver_leaves_sixteen_bits_alone(role, name, options):
    solver = create(role, RoleSpec(name, options))
    found = statistics(solver.needs)
    result = solver.solve(Weight().aim(WEIGHT, found), found, uniform_grid(N_IN, GridSpec(16)))
    assert result.stored is None
    assert torch.equal(result.dequantized, WEIGHT)


@pytest.mark.parametrize(("role", "name", "options"), rows("target"))
def test_a_target_moves_the_weight_by_the_drift_alone(role, name, options):
    target = create(role, RoleSpec(name, options))
    found = statistics(target.needs)
    before = contents(found)
    kept = WEIGHT.clone()
    aim = target.aim(WEIGHT, found)
    assert same(before, contents(found))
    assert torch.equal(kept, WEIGHT)
    assert aim.weight.shape == WEIGHT.shape
    assert bool(aim.weight.isfinite().all())
    assert torch.allclose(aim.second_moment, aim.second_moment.T)
    assert torch.equal(aim.weight, WEIGHT) == (not target.needs)
    still = target.aim(WEIGHT, statistics(target.needs, drift=0.0))
    others = [i for i in range(N_IN) if i != 5]  # the input of channel 5 was lost in the quantized stream
    torch.testing.assert_close(still.weight[:, others], WEIGHT[:, others])


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(("role", "name", "options"), rows("refine"))
def test_a_refinement_keeps_the_codes(role, name, options, grid):
    refine = create(role, RoleSpec(name, options))
    found = statistics(refine.needs | Gptq.needs)
    aim = Weight().aim(WEIGHT, found)
    result = Gptq().solve(aim, found, grid, refine.reads_working)
    before = contents(aim, found, result)
    repaired = refine.repair(WEIGHT, aim, result, found)
    assert isinstance(repaired, Repaired)
    assert same(before, contents(aim, found, result))
    ours = repaired.result
    assert torch.equal(plain(ours.stored.codes), plain(result.stored.codes))
    assert same(
        *([stored.zero_point] if stored.zero_point is not None else [] for stored in (ours.stored, result.stored))
    )
    torch.testing.assert_close(ours.stored.weight(), ours.dequantized, rtol=1e-12, atol=0)
    if repaired.row_scale is not None:
        assert bool((repaired.row_scale > 0).all())
        torch.testing.assert_close(repaired.row_scale[:, None] * result.dequantized, ours.dequantized)
