"""Null-space row scales: golden numbers, the rank rule by double loop, W_proj and torch's Adam written out."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.optim.adam import adam

from ptqbench.errors import CalibrationError, ConfigError, NumericalError
from ptqbench.numerics.null_space import (
    PositionMean,
    RowScaleSolver,
    apply_row_scale,
    null_space_row_scale,
    signal_rank,
    signal_space,
)

SOLVERS: list[RowScaleSolver] = ["closed", "adam20"]
SINK_SPECTRUM = [100, 5, 3, 1, 0.5, 0.3, 0.1, 0.05]
FLAT_SPECTRUM = [100.0] + [4.0] * 7


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def loop_rank(spectrum: list[float], threshold: float) -> int | None:
    """Apply the rank rule entry by entry."""
    s = sorted((max(value, 0.0) for value in spectrum), reverse=True)
    for r in range(2, len(s) + 1):
        below, above = 0.0, 0.0
        for j in range(1, r):
            below += s[j]
        for j in range(r + 1, len(s)):
            above += s[j]
        if below > 1e-12 and above / below <= threshold:
            return r
    return None


def projected_weight(weight: Tensor, rounded: Tensor, basis: Tensor) -> Tensor:
    """Return W_proj = W (I - P) + Q P with the explicit projector on the null space."""
    null = torch.eye(basis.shape[0], dtype=basis.dtype) - basis @ basis.T
    return weight @ (torch.eye(basis.shape[0], dtype=basis.dtype) - null) + rounded @ null


@functools.cache
def toy_vectors(columns: int) -> Tensor:
    return torch.linalg.qr(normal(columns, columns, seed=1)).Q


def toy_layer(rows: int = 64, columns: int = 256, bits: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight, its asymmetric RTN image per row, and a power-law second moment in a random basis."""
    weight = normal(rows, columns)
    low, high = weight.min(1, keepdim=True).values, weight.max(1, keepdim=True).values
    scale = (high - low) / (2**bits - 1)
    zero = torch.round(-low / scale)
    rounded = scale * ((torch.round(weight / scale) + zero).clamp(0, 2**bits - 1) - zero)
    vectors = toy_vectors(columns)
    spectrum = torch.arange(1, columns + 1, dtype=torch.float64) ** -1.3
    return weight, rounded, (vectors * spectrum) @ vectors.T


def basis_of(second_moment: Tensor, rank: int) -> Tensor:
    """Return the strong eigenvectors of a toy moment: known by construction."""
    return toy_vectors(second_moment.shape[0])[:, :rank]


class TestRankRule:
    """Prefix-suffix ratio."""

    @pytest.mark.parametrize(
        ("spectrum", "threshold", "rank"),
        [
            *((SINK_SPECTRUM, t, r) for t, r in [(0.05, 4), (0.1, 4), (0.2, 3), (0.5, 2)]),
            *((FLAT_SPECTRUM, t, r) for t, r in [(0.05, 7), (0.1, 7), (0.2, 6), (0.5, 5)]),
            *(([10.0, 1.0, 0.0, 0.0, 0.0], t, 2) for t in (0.05, 0.1, 0.2, 0.5)),
            ([3.0] * 100, 0.1, 91),
            ([1 / (j + 1) for j in range(4096)], 0.1, 1998),
            ([1 / (j + 1) for j in range(4096)], 0.05, 2812),
            ([(j + 1) ** -1.5 for j in range(4096)], 0.1, 130),
        ],
    )
    def test_golden(self, spectrum: list[float], threshold: float, rank: int) -> None:
        assert signal_rank(torch.tensor(spectrum, dtype=torch.float64), threshold) == rank

    @pytest.mark.parametrize("threshold", [0.05, 0.1, 0.5])
    def test_matches_the_double_loop_on_random_spectra(self, threshold: float) -> None:
        g = rng(5)
        for _ in range(300):
            n = int(torch.randint(1, 40, (1,), generator=g))
            decay = float(torch.rand(1, generator=g)) * 6
            spectrum = torch.rand(n, generator=g, dtype=torch.float64).add(0.01).pow(1 + decay)
            spectrum[torch.rand(n, generator=g) < 0.2] *= -1e-3  # round-off of a semidefinite matrix, in any order
            assert signal_rank(spectrum, threshold) == loop_rank(spectrum.tolist(), threshold)

    @pytest.mark.parametrize(
        ("spectrum", "rank"),
        [
            ([], None),
            ([5.0], None),
            ([5.0, 0.0], None),
            ([5.0, 1.0], 2),
            ([5.0, 1.0, 1.0], 2),
            ([7.0, 0.0, 0.0, 0.0], None),
            ([7.0, -1.0, -2.0, -3.0], None),
            ([1.0, 4e-13, 4e-13, 4e-13, 4e-13], 4),  # the denominator passes the absolute floor at three terms
            ([1.0, 3e-13, 3e-13, 3e-13], None),
        ],
    )
    def test_edges(self, spectrum: list[float], rank: int | None) -> None:
        assert signal_rank(torch.tensor(spectrum, dtype=torch.float64), 0.1) == rank
        assert loop_rank(spectrum, 0.1) == rank

    def test_the_largest_and_the_boundary_eigenvalue_are_in_neither_sum(self) -> None:
        spectrum = torch.tensor(SINK_SPECTRUM, dtype=torch.float64)
        huge_sink, boundary = spectrum.clone(), spectrum.clone()
        huge_sink[0], boundary[4] = 1e9, 0.9
        assert signal_rank(huge_sink, 0.1) == signal_rank(boundary, 0.1) == 4
        after = spectrum.clone()
        after[5] = 0.5
        assert signal_rank(after, 0.1) == 4
        assert signal_rank(after, 0.06) == 5

    def test_scale_of_the_moment_is_irrelevant(self) -> None:
        spectrum = normal(50, seed=3).square()
        assert len({signal_rank(c * spectrum, 0.1) for c in (2.0**-20, 1.0, 2.0**30)}) == 1

    def test_nan_is_refused(self) -> None:
        with pytest.raises(NumericalError, match="eigenvalues"):
            signal_rank(torch.tensor([1.0, float("nan")]), 0.1)


class TestSignalSpace:
    """Eigenvectors and rank of one input."""

    def test_basis_spans_the_strong_eigenvectors_in_falling_order(self) -> None:
        vectors = torch.linalg.qr(normal(8, 8)).Q
        moment = (vectors * torch.tensor(SINK_SPECTRUM, dtype=torch.float64)) @ vectors.T
        basis = signal_space(moment, threshold=0.1)
        assert basis is not None
        overlaps = (vectors[:, :4].T @ basis).abs()
        torch.testing.assert_close(overlaps, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-10)

    def test_no_rank_is_explicit(self) -> None:
        sink = torch.zeros(5, 5, dtype=torch.float64)
        sink[2, 2] = 3.0
        assert signal_space(sink, threshold=0.1) is None
        assert signal_space(torch.zeros(5, 5), threshold=0.1) is None

    def test_nan_is_refused(self) -> None:
        with pytest.raises(NumericalError, match="second_moment"):
            signal_space(torch.full((3, 3), float("nan")), threshold=0.1)


class TestRowScale:
    """Closed form and Adam."""

    def test_golden(self) -> None:
        weight = torch.tensor([[1, -2, 0.5, 0.25], [0.3, 0.1, -0.7, 0.9]], dtype=torch.float64)
        rounded = torch.tensor([[1, -1.5, 0.5, 0], [0.5, 0, -0.5, 1]], dtype=torch.float64)
        basis = torch.eye(4, dtype=torch.float64)[:, :2]
        alpha = null_space_row_scale(weight, rounded, basis, ridge=0.2)
        assert alpha.tolist() == pytest.approx([1.2027027, 0.9411765], abs=5e-8)

    @pytest.mark.parametrize("ridge", [0.0, 0.2, 30.0])
    def test_equals_the_explicit_projection_formula(self, ridge: float) -> None:
        weight, rounded, moment = toy_layer()
        basis = basis_of(moment, 60)
        target = projected_weight(weight, rounded, basis)
        slow = [(float(target[i] @ rounded[i]) + ridge) / (float(rounded[i] @ rounded[i]) + ridge) for i in range(64)]
        alpha = null_space_row_scale(weight, rounded, basis, ridge=ridge)
        assert alpha.tolist() == pytest.approx(slow, rel=1e-12)

    def test_closed_form_minimises_the_objective(self) -> None:
        weight, rounded, moment = toy_layer(rows=4, columns=16)
        basis = basis_of(moment, 5)
        target = projected_weight(weight, rounded, basis)
        alpha = null_space_row_scale(weight, rounded, basis, ridge=0.2).requires_grad_()
        objective = ((alpha[:, None] * rounded - target) ** 2).sum() + 0.2 * ((alpha - 1) ** 2).sum()
        objective.backward()
        assert alpha.grad is not None
        assert alpha.grad.abs().max() < 1e-11

    def test_adam20_equals_torch_adam_on_the_explicit_objective(self) -> None:
        weight, rounded, moment = toy_layer()
        basis = basis_of(moment, 60)
        target = projected_weight(weight, rounded, basis)
        alpha = torch.ones(64, dtype=torch.float64)
        first, second, step = torch.zeros_like(alpha), torch.zeros_like(alpha), torch.tensor(0.0)
        for _ in range(20):
            free = alpha.clone().requires_grad_()
            objective = ((free[:, None] * rounded - target) ** 2).sum() + 0.2 * ((free - 1) ** 2).sum()
            (gradient,) = torch.autograd.grad(objective, free)
            # the function behind torch.optim.Adam, whose constructor imports the compiler
            adam(
                [alpha], [gradient], [first], [second], [], [step], amsgrad=False, beta1=0.9, beta2=0.999, lr=2e-3,
                weight_decay=0.0, eps=1e-8, maximize=False,
            )  # fmt: skip
        fast = null_space_row_scale(weight, rounded, basis, ridge=0.2, solver="adam20")
        torch.testing.assert_close(fast, alpha, rtol=0, atol=1e-10)

    def test_adam20_stays_near_one_where_the_closed_form_does_not(self) -> None:
        weight, rounded, moment = toy_layer()
        basis = basis_of(moment, 256)
        closed, adam = (null_space_row_scale(2 * weight, rounded, basis, ridge=0.2, solver=s) for s in SOLVERS)
        assert (closed - 1).abs().min() > 0.5
        assert (adam - 1).abs().min() > 0.03
        assert (adam - 1).abs().max() < 0.041

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_fixed_points(self, solver: RowScaleSolver) -> None:
        """An empty signal space and a perfect rounding leave alpha at exactly 1."""
        weight, rounded, moment = toy_layer()
        ones = torch.ones(64, dtype=torch.float64)
        empty = null_space_row_scale(weight, rounded, moment[:, :0], ridge=0.2, solver=solver)
        perfect = null_space_row_scale(weight, weight, basis_of(moment, 60), ridge=0.2, solver=solver)
        assert torch.equal(empty, ones)
        assert torch.equal(perfect, ones)

    def test_full_signal_space_is_ridge_regression_of_each_row(self) -> None:
        weight, rounded, moment = toy_layer(rows=3, columns=16)
        alpha = null_space_row_scale(weight, rounded, basis_of(moment, 16), ridge=0.2)
        for i in range(3):  # || a Q_i - W_i ||^2 + ridge (a - 1)^2 as least squares on stacked rows
            rows = torch.cat([rounded[i], torch.tensor([0.2**0.5])])[:, None]
            goal = torch.cat([weight[i], torch.tensor([0.2**0.5])])[:, None]
            assert float(alpha[i]) == pytest.approx(float(torch.linalg.lstsq(rows, goal).solution), rel=1e-7)

    def test_infinite_ridge_gives_one(self) -> None:
        weight, rounded, moment = toy_layer()
        alpha = null_space_row_scale(weight, rounded, basis_of(moment, 60), ridge=1e9)
        assert 0 < (alpha - 1).abs().max() < 1e-7

    def test_joint_scaling_needs_the_ridge_scaled_too(self) -> None:
        weight, rounded, moment = toy_layer()
        basis, c = basis_of(moment, 60), 0.05
        alpha = null_space_row_scale(weight, rounded, basis, ridge=0.2)
        scaled = null_space_row_scale(c * weight, c * rounded, basis, ridge=c**2 * 0.2)
        fixed = null_space_row_scale(c * weight, c * rounded, basis, ridge=0.2)
        torch.testing.assert_close(scaled, alpha, rtol=1e-12, atol=0)
        assert (fixed - alpha).abs().max() > 1e-3

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_zero_row_gets_one_also_without_ridge(self, solver: RowScaleSolver) -> None:
        weight, rounded, moment = toy_layer(rows=3, columns=16)
        rounded[1] = 0
        alpha = null_space_row_scale(weight, rounded, basis_of(moment, 5), ridge=0.0, solver=solver)
        assert alpha[1] == 1
        assert alpha[0] != 1

    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_non_finite_argument_is_named(self, which: int) -> None:
        weight, rounded, moment = toy_layer(rows=3, columns=16)
        arguments = [weight, rounded, basis_of(moment, 5).clone()]
        arguments[which][1, 1] = float("inf")
        with pytest.raises(NumericalError, match=["weight", "dequantized", "basis"][which]):
            null_space_row_scale(*arguments, ridge=0.2)

    def test_wrong_arguments(self) -> None:
        weight, rounded, moment = toy_layer(rows=3, columns=16)
        basis = basis_of(moment, 5)
        with pytest.raises(ConfigError, match="solver"):
            null_space_row_scale(weight, rounded, basis, ridge=0.2, solver="sgd")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="dequantized"):
            null_space_row_scale(weight, rounded.T, basis, ridge=0.2)
        with pytest.raises(ConfigError, match="basis"):
            null_space_row_scale(weight, rounded, basis.T, ridge=0.2)


def refined(
    weight: Tensor, rounded: Tensor, moment: Tensor, solver: RowScaleSolver = "closed"
) -> tuple[int, Tensor, Tensor]:
    """Return rank, row scales and the rescaled weight, from the second moment on."""
    basis = signal_space(moment, threshold=0.1)
    assert basis is not None
    alpha = null_space_row_scale(weight, rounded, basis, ridge=0.2, solver=solver)
    return basis.shape[1], alpha, apply_row_scale(alpha, rounded)


class TestRefine:
    """From the second moment to the rescaled weight."""

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_permutation_and_rotation_of_the_channels_leave_alpha_unchanged(self, solver: RowScaleSolver) -> None:
        weight, rounded, moment = toy_layer(rows=16, columns=64)
        rank, plain, rescaled = refined(weight, rounded, moment, solver)
        order = torch.randperm(64, generator=rng())
        rotation = torch.linalg.qr(normal(64, 64, seed=9)).Q
        for basis in (torch.eye(64, dtype=torch.float64)[:, order], rotation):
            turned = basis.T @ moment @ basis
            other_rank, alpha, result = refined(weight @ basis, rounded @ basis, turned, solver)
            assert other_rank == rank
            torch.testing.assert_close(alpha, plain, rtol=0, atol=1e-9)
            torch.testing.assert_close(result, rescaled @ basis, rtol=0, atol=1e-9)
        mixed = refined(weight, rounded, turned, solver)[1]  # the order mismatch to avoid
        assert (mixed - plain).abs().max() > 1e-3

    def test_scale_of_the_moment_is_irrelevant(self) -> None:
        weight, rounded, moment = toy_layer(rows=16, columns=64)
        results = [refined(weight, rounded, c * moment) for c in (1e-3, 1.0, 1e6)]
        assert len({rank for rank, _, _ in results}) == 1
        for _, alpha, _ in results[1:]:
            torch.testing.assert_close(alpha, results[0][1], rtol=0, atol=1e-9)

    def test_corrects_the_error_on_the_inputs_of_the_toy(self) -> None:
        """3-bit toy: a small shrinkage of nearly every row, and less error on the signal space than before."""
        weight, rounded, moment = toy_layer()
        basis = basis_of(moment, 60)
        closed, adam = (null_space_row_scale(weight, rounded, basis, ridge=0.2, solver=s) for s in SOLVERS)
        for alpha in (closed, adam):
            assert alpha.min() > 0.95
            assert 0.98 < alpha.mean() < 0.995 < alpha.max() < 1.02
            rescaled = apply_row_scale(alpha, rounded)
            before, after = (float(((weight - q) @ basis).square().sum()) for q in (rounded, rescaled))
            assert after < before
        assert 0.02 < (closed - 1).abs().max() < 0.05
        assert float((closed - adam).abs().max()) == pytest.approx(0.0055, abs=1e-4)

    def test_inputs_are_not_modified_and_calls_repeat_bit_for_bit(self) -> None:
        weight, rounded, moment = (part.float() for part in toy_layer(rows=16, columns=64))
        before = [part.clone() for part in (weight, rounded, moment)]
        first, second = (refined(weight, rounded, moment)[1] for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip((weight, rounded, moment), before, strict=True))
        assert first.dtype == torch.float32
        assert first.numpy().tobytes() == second.numpy().tobytes()


class TestApplyRowScale:
    """Absorption into the stored scales."""

    def test_every_group_of_a_row_changes_by_the_same_factor_and_codes_stay(self) -> None:
        codes = torch.randint(0, 8, (4, 12), generator=rng())
        scale, zero_point = normal(4, 3).abs() + 0.1, torch.randint(0, 8, (4, 3), generator=rng())

        def dequantize(group_scale: Tensor) -> Tensor:
            return group_scale.repeat_interleave(4, 1) * (codes - zero_point.repeat_interleave(4, 1))

        alpha = torch.tensor([0.9, 1.0, 1.1, -0.5], dtype=torch.float64)
        scaled = apply_row_scale(alpha, scale)
        torch.testing.assert_close(scaled / scale, alpha[:, None].expand(4, 3))
        torch.testing.assert_close(dequantize(scaled), apply_row_scale(alpha, dequantize(scale)))
        assert torch.equal(apply_row_scale(alpha, scale[:, 0]), scaled[:, 0])

    def test_storage_dtype_is_rounded_once(self) -> None:
        alpha, scale = torch.tensor([1.0035]), torch.tensor([[1.5]], dtype=torch.bfloat16)
        result = apply_row_scale(alpha, scale)  # alpha alone would round to 1 in bfloat16
        assert result.dtype == torch.bfloat16
        assert float(result) == float((alpha * scale.float()).bfloat16()) != float(alpha.bfloat16() * scale)


class TestPositionMean:
    """The authors' moment."""

    def test_equals_the_mean_per_position(self) -> None:
        sequences = normal(6, 5, 4)
        accumulator = PositionMean(5, 4, dtype=torch.float64)
        accumulator.add(sequences[0])
        accumulator.add(sequences[1:4])
        accumulator.add(sequences[4:])
        slow = torch.zeros(4, 4, dtype=torch.float64)
        for position in range(5):
            mean = torch.stack([sequences[s, position] for s in range(6)]).mean(0)
            slow += torch.outer(mean, mean)
        torch.testing.assert_close(accumulator.second_moment(), slow, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(slow, sum(s.T @ s for s in sequences) / 6)

    def test_rank_is_at_most_the_sequence_length(self) -> None:
        accumulator = PositionMean(3, 8, dtype=torch.float64)
        accumulator.add(normal(10, 3, 8))
        assert int(torch.linalg.matrix_rank(accumulator.second_moment())) == 3

    def test_bad_input_is_refused(self) -> None:
        accumulator = PositionMean(3, 8)
        with pytest.raises(CalibrationError, match="at least one"):
            accumulator.second_moment()
        with pytest.raises(CalibrationError, match="fixed seq_len"):
            accumulator.add(torch.ones(2, 8))
        accumulator.add(torch.full((3, 8), float("nan")))
        with pytest.raises(NumericalError, match="position_mean"):
            accumulator.second_moment()
