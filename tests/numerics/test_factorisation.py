"""The factor of the damped inverse, and every way in which it can fail."""

from __future__ import annotations

import pytest
import torch
from reference_problems import F64, correlated_inputs, random_weight

from ptqbench.errors import ConfigError, NumericalError
from ptqbench.numerics import factorisation
from ptqbench.numerics.factorisation import factorise
from ptqbench.numerics.gptq import gptq
from ptqbench.numerics.grid import uniform_grid
from ptqbench.numerics.grid_spec import GridSpec


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("leaf", [1, 7, 256])
def test_factor_inverts_the_damped_moment(act_order: bool, leaf: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factorisation, "INVERSION_LEAF", leaf)
    x = correlated_inputs(200, 23, seed=0)
    moment = x.T @ x
    before = moment.clone()
    factor = factorise(moment, damping=0.03, act_order=act_order)
    damped = moment + 0.03 * moment.diagonal().mean() * torch.eye(23, dtype=F64)
    if act_order:
        assert torch.equal(factor.order, torch.argsort(moment.diagonal(), descending=True))
        damped = damped[factor.order][:, factor.order]
    assert torch.equal(factor.upper, factor.upper.triu())
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert torch.allclose(factor.upper, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(moment, before)


def test_dead_channels_are_uncoupled_last_in_order_and_free_of_scale() -> None:
    x = correlated_inputs(200, 9, seed=1)
    x[:, [2, 6]] = 0
    factor = factorise(x.T @ x, act_order=True)
    assert factor.dead.nonzero().flatten().tolist() == [2, 6] == factor.order[-2:].tolist()
    tiny = factorise(1e-8 * x.T @ x, act_order=True)
    assert torch.allclose(tiny.upper * 1e-4, factor.upper, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_rank_deficient_moment_fails_without_damping_and_works_with_it(dtype: torch.dtype) -> None:
    x = correlated_inputs(20, 48, seed=2, dtype=dtype)
    with pytest.raises(NumericalError, match=r"damping 0\.0"):
        factorise(x.T @ x, damping=0.0)
    assert torch.isfinite(factorise(x.T @ x, damping=0.01).upper).all()


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_one_duplicated_channel_counts_as_singular(dtype: torch.dtype) -> None:
    for seed in range(8):
        x = correlated_inputs(100, 12, seed=seed, dtype=dtype)
        x[:, 7] = x[:, 3]
        with pytest.raises(NumericalError, match="damping"):
            factorise(x.T @ x, damping=0.0)


def test_retry_raises_the_damping_and_records_it() -> None:
    x = correlated_inputs(20, 48, seed=3)
    factor = factorise(x.T @ x, damping=0.0, on_cholesky_failure="retry")
    assert (factor.damping_used, factor.retries) == (0.01, 1)
    weight, grid = random_weight(3, 48, seed=4), uniform_grid(48, GridSpec(3))
    retried = gptq(weight, x.T @ x, grid, damping=0.0, on_cholesky_failure="retry")
    plain = gptq(weight, x.T @ x, grid, damping=0.01)
    assert torch.equal(retried.stored.codes, plain.stored.codes)
    assert (retried.damping_used, retried.damping_retries) == (0.01, 1)
    assert (plain.damping_used, plain.damping_retries) == (0.01, 0)


def test_retry_multiplies_and_gives_up_in_the_end() -> None:
    indefinite = torch.tensor([[1.0, 1.5], [1.5, 1.0]], dtype=F64)  # eigenvalues 2.5, -0.5
    factor = factorise(indefinite, damping=0.01, on_cholesky_failure="retry")
    assert (factor.damping_used, factor.retries) == (pytest.approx(1.0), 2)
    with pytest.raises(NumericalError, match="4 retries"):
        factorise(torch.tensor([[1.0, 1e9], [1e9, 1.0]]), on_cholesky_failure="retry")
    with pytest.raises(NumericalError, match="0 retries"):
        factorise(indefinite)


def test_bad_moments_are_named() -> None:
    moment = torch.eye(4)
    moment[1, 3] = torch.nan
    with pytest.raises(NumericalError, match=r"second_moment.*\[1, 3\]"):
        factorise(moment)
    with pytest.raises(NumericalError, match=r"diagonal >= 0, got -1\.0 at index 2"):
        factorise(torch.diag(torch.tensor([1.0, 1.0, -1.0])))
    with pytest.raises(NumericalError, match="zeros only"):
        factorise(torch.zeros(3, 3))
    with pytest.raises(ConfigError, match="second_moment"):
        factorise(torch.zeros(3, 4))
    with pytest.raises(ConfigError, match="damping"):
        factorise(torch.eye(3), damping=-0.1)
    with pytest.raises(ConfigError, match="on_cholesky_failure"):
        factorise(torch.eye(3), on_cholesky_failure="ignore")
