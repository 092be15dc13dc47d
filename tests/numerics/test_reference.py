"""The fast paths against ``numerics/reference.py``: float64 results to 1e-9, and equal codes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_problems import F64, correlated_inputs, random_weight
from torch import Tensor

from ptqbench.numerics import reference, reference_formats
from ptqbench.numerics.formats import FORMATS
from ptqbench.numerics.gptaq import gptaq
from ptqbench.numerics.gptq import gptq
from ptqbench.numerics.grid import LinearResult, uniform_grid
from ptqbench.numerics.grid_spec import GridSpec
from ptqbench.numerics.null_space import null_space_row_scale, signal_space
from ptqbench.numerics.qronos import qronos
from ptqbench.numerics.rtn import round_to_nearest
from ptqbench.numerics.scale_refit import refit_row_scale
from ptqbench.numerics.targets import TargetMoments, corrected_target, token_weights

EPS = 1e-5


class Problem(NamedTuple):
    """One linear with the inputs and residuals of both streams."""

    weight: Tensor
    full: Tensor
    quantized: Tensor
    residual: Tensor
    residual_q: Tensor

    @property
    def moment(self) -> Tensor:
        return self.quantized.T @ self.quantized

    @property
    def cross(self) -> Tensor:
        return self.quantized.T @ (self.full - self.quantized)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    rows, channels, seed = draw(st.integers(1, 9)), draw(st.integers(2, 40)), draw(st.integers(0, 999))
    tokens = 3 * channels
    quantized = correlated_inputs(tokens, channels, seed)
    full = quantized + 0.2 * correlated_inputs(tokens, channels, seed + 1)
    for channel in draw(st.sets(st.integers(0, channels - 1), max_size=max(0, channels - 2))) if seed % 3 == 0 else ():
        quantized[:, channel] = 0
    residual = random_weight(tokens, rows, seed + 2)
    return Problem(
        random_weight(rows, channels, seed + 3), full, quantized, residual, residual + 0.3 * residual.roll(1, 0)
    )


OPTIONS = st.builds(
    reference.Options,
    bits=st.sampled_from([2, 3, 4, 8]),
    scheme=st.sampled_from(["asym", "sym_gptq", "sym_signed"]),
    clip_search=st.booleans(),
    group_size=st.sampled_from([None, 1, 5, 16]),
    act_order=st.booleans(),
    static_groups=st.booleans(),
    format=st.sampled_from([None, None, *reference.FORMATS]),
).filter(
    lambda options: not (options.clip_search and options.group_size)
)  # in tiny groups several ranges are exact: ties
CHECK = settings(max_examples=40, deadline=None, derandomize=True)


def spec(options: reference.Options) -> GridSpec:
    if options.format is not None:
        return GridSpec(FORMATS[options.format].elements.bits, format=options.format)
    return GridSpec(options.bits, options.scheme, options.group_size, options.clip_search)


def loop(options: reference.Options, damping: float) -> dict:
    return {
        "act_order": options.act_order,
        "static_groups": options.static_groups,
        "damping": damping,
        "column_block": 7,
    }


def assert_equal(found: LinearResult, expected: reference.Rounded) -> None:
    stored = found.stored
    unit = 1.0 if stored.specs[0].integer else stored.specs[0].own_format.elements.unit  # codes are values there
    assert torch.equal(stored.codes.double() * unit, expected.codes)
    assert torch.allclose(found.dequantized, expected.values, rtol=0, atol=1e-9)


@CHECK
@given(problem=problems(), options=OPTIONS)
def test_rtn(problem: Problem, options: reference.Options) -> None:
    found = round_to_nearest(problem.weight, uniform_grid(problem.weight.shape[1], spec(options)))
    assert_equal(found, reference.rtn(problem.weight, options))


@CHECK
@given(problem=problems(), options=OPTIONS, damping=st.sampled_from([0.01, 0.3]))
def test_gptq(problem: Problem, options: reference.Options, damping: float) -> None:
    weight, moment = problem.weight, problem.moment
    found = gptq(weight, moment, uniform_grid(weight.shape[1], spec(options)), **loop(options, damping))
    assert_equal(found, reference.gptq(weight, moment, options, damping))


@CHECK
@given(problem=problems(), options=OPTIONS, strength=st.sampled_from([0.25, 1.0]))
def test_gptaq(problem: Problem, options: reference.Options, strength: float) -> None:
    weight, moment, cross = problem.weight, problem.moment, problem.cross
    grid = uniform_grid(weight.shape[1], spec(options))
    found = gptaq(weight, moment, cross, grid, strength=strength, **loop(options, 0.02))
    assert_equal(found, reference.gptaq(weight, moment, cross, options, 0.02, strength))


@CHECK
@given(problem=problems(), options=OPTIONS)
def test_qronos(problem: Problem, options: reference.Options) -> None:
    weight, moment, cross = problem.weight, problem.moment, problem.cross
    found = qronos(weight, moment, cross, uniform_grid(weight.shape[1], spec(options)), **loop(options, 0.02))
    assert_equal(found, reference.qronos(weight, moment, cross, options, 0.02))


@CHECK
@given(problem=problems(), alpha=st.sampled_from([0.0, 0.5, 1.0]), damping=st.sampled_from([0.01, 1.0]))
def test_qep(problem: Problem, alpha: float, damping: float) -> None:
    weight = problem.weight
    found = corrected_target(weight, problem.moment, problem.cross, alpha=alpha, beta=0.0, damping=damping)
    expected = reference.qep_target(weight, problem.full, problem.quantized, alpha, damping)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)


@CHECK
@given(
    problem=problems(),
    rms_scale=st.sampled_from([None, "none", "common", "split"]),
    strengths=st.sampled_from([(1.0, 1.0), (0.5, 0.25), (0.0, 1.0), (1.0, 0.0)]),
    dead_channels=st.sampled_from(["zero", "keep_column"]),
)  # fmt: skip
def test_loaq(problem: Problem, rms_scale: str | None, strengths: tuple[float, float], dead_channels: str) -> None:
    """``rms_scale`` None is the level ``linear``, without residuals."""
    weight, full, quantized, residual, residual_q = problem
    pair = () if rms_scale is None else (residual, residual_q)
    options = {"alpha": strengths[0], "beta": strengths[1], "damping": 0.03, "dead_channels": dead_channels}
    moments = TargetMoments(weight.shape[1], weight.shape[0] if pair else None, dtype=F64)
    hidden = residual + full @ weight.T, residual_q + quantized @ weight.T
    moments.add(full, quantized, *pair, weights=token_weights(rms_scale or "none", *hidden, eps=EPS))
    found = moments.means()
    expected, moment = reference.loaq_target(
        weight, full, quantized, *pair, rms_scale=rms_scale or "none", eps=EPS, **options
    )
    assert torch.allclose(corrected_target(weight, *found, **options), expected, rtol=0, atol=1e-9)
    assert torch.allclose(found.second_moment * len(full), moment, rtol=1e-12, atol=1e-12)


@CHECK
@given(problem=problems(), threshold=st.sampled_from([0.01, 0.1, 0.5]), ridge=st.sampled_from([0.0, 0.2, 5.0]))
def test_null_space(problem: Problem, threshold: float, ridge: float) -> None:
    weight, moment = problem.weight.clone(), problem.full.T @ problem.full
    weight[0] = 0
    rounded = reference.rtn(weight, reference.Options(3)).values
    found = null_space_row_scale(weight, rounded, signal_space(moment, threshold=threshold), ridge=ridge)
    expected = reference.null_space_row_scale(weight, rounded, moment, threshold, ridge)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)


def test_null_space_without_a_rank_changes_nothing() -> None:
    weight, moment = random_weight(3, 4, seed=0), torch.diag(torch.tensor([1.0, 0, 0, 0], dtype=F64))
    assert signal_space(moment, threshold=0.1) is None
    assert torch.equal(reference.null_space_row_scale(weight, weight.round(), moment), torch.ones(3, dtype=F64))
    whole = null_space_row_scale(weight, weight.round(), torch.eye(4, dtype=F64)[:, :2], ridge=0.2)
    assert not torch.equal(whole, torch.ones(3, dtype=F64))


@CHECK
@given(problem=problems(), bits=st.sampled_from([2, 4]))
def test_scale_refit(problem: Problem, bits: int) -> None:
    weight = problem.weight.clone()
    weight[0] = 0
    rounded = reference.rtn(weight, reference.Options(bits)).values
    expected = reference.scale_refit(weight, rounded, problem.full.T @ problem.full)
    assert torch.allclose(refit_row_scale(weight, rounded, problem.full.T @ problem.full), expected, rtol=0, atol=1e-9)
    assert expected[0] == 1


def test_the_reference_shares_nothing_with_the_fast_paths() -> None:
    own = {reference.__name__, reference_formats.__name__}
    for module in (reference, reference_formats):
        homes = {str(getattr(value, "__module__", "")) for value in vars(module).values()}
        assert {home for home in homes if home.startswith("ptqbench.numerics")} <= own
