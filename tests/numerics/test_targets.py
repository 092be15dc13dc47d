"""Output-aware targets: golden numbers, laws in float64, and least squares on the raw token matrices as reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference_targets import EPS, TOY_TARGETS, Streams, asym_grid, random_streams, raw_target, slow_gptq, toy
from torch import Tensor

from ptqbench.errors import CalibrationError, ConfigError, NumericalError
from ptqbench.numerics.targets import (
    RmsScale,
    TargetMoments,
    TokenWeights,
    corrected_target,
    inverse_rms,
    relative_correction,
    token_weights,
)

RMS_SCALES: list[RmsScale] = ["none", "common", "split"]


def moments_of(
    streams: Streams, rms_scale: RmsScale = "none", *, residual: bool = True, batch: int = 3
) -> TargetMoments:
    """Stream the tokens through the accumulator in uneven batches."""
    n, m = streams.x.shape[1], streams.weight.shape[0]
    moments = TargetMoments(n, m if residual else None, dtype=torch.float64)
    for x, xq, r, rq in zip(
        *(part.split(batch) for part in (streams.x, streams.xq, streams.r, streams.rq)), strict=True
    ):
        weights = token_weights(rms_scale, r + x @ streams.weight.T, rq + xq @ streams.weight.T, eps=EPS)
        moments.add(x, xq, r if residual else None, rq if residual else None, weights)
    return moments


def target_of(
    streams: Streams, rms_scale: RmsScale = "none", alpha: float = 1, beta: float = 1, damping: float = 0.01
) -> Tensor:
    """Return the corrected target through the streaming path."""
    moments = moments_of(streams, rms_scale).means()
    return corrected_target(streams.weight, *moments, alpha=alpha, beta=beta, damping=damping)


class TestGolden:
    """Exact numbers of the 4-token toy."""

    def test_moments(self) -> None:
        means = moments_of(toy()).means()
        assert means.cross_moment is not None
        assert means.residual_moment is not None
        expected = [[1.29, 0.2, 0.6, 0.56], [0.1, 0.02, 0.03, -0.05], [-0.15, 0.03]]
        for moment, row in zip(means, expected, strict=True):
            torch.testing.assert_close(4 * moment[0], torch.tensor(row, dtype=torch.float64), rtol=0, atol=1e-12)
        assert 0.01 * 4 * means.second_moment.diagonal().mean() == pytest.approx(0.012075, abs=1e-12)

    @pytest.mark.parametrize(("rms_scale", "alpha", "beta", "damping"), list(TOY_TARGETS))
    def test_target(self, rms_scale: RmsScale, alpha: float, beta: float, damping: float) -> None:
        rows = TOY_TARGETS[rms_scale, alpha, beta, damping]
        target = target_of(toy(), rms_scale, alpha, beta, damping)
        torch.testing.assert_close(target, torch.tensor(rows, dtype=torch.float64), rtol=0, atol=6e-7)

    def test_codes_of_the_linear_target_on_the_grid_of_the_weight(self) -> None:
        streams = toy()
        scale, zero_point = asym_grid(streams.weight, 2)
        moment = moments_of(streams).means().second_moment
        plain = slow_gptq(streams.weight, moment, scale, zero_point, 2)
        linear = slow_gptq(target_of(streams, beta=0), moment, scale, zero_point, 2)
        assert plain.tolist() == [[3, 1, 1, 0], [1, 3, 0, 1]]
        assert linear.tolist() == [[3, 0, 2, 0], [1, 3, 0, 1]]

    def test_grid_and_codes_of_the_sublayer_target(self) -> None:
        streams = toy()
        target = target_of(streams)
        scale, zero_point = asym_grid(target, 2)
        assert scale.tolist() == pytest.approx([0.617094, 0.437545], abs=6e-7)
        assert zero_point.tolist() == [2, 1]
        codes = slow_gptq(target, moments_of(streams).means().second_moment, scale, zero_point, 2)
        assert codes.tolist() == [[3, 1, 3, 1], [2, 3, 0, 0]]


class TestOptimality:
    """The target solves the stated problem."""

    @pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
    @pytest.mark.parametrize("rms_scale", RMS_SCALES)
    def test_equals_least_squares_on_raw_rows(self, rms_scale: RmsScale, damping: float) -> None:
        streams = random_streams()
        torch.testing.assert_close(
            target_of(streams, rms_scale, damping=damping),
            raw_target(streams, rms_scale, damping),
            rtol=1e-9,
            atol=1e-9,
        )

    def test_linear_target_equals_least_squares_without_residual(self) -> None:
        streams = random_streams()
        means = moments_of(streams, residual=False).means()
        assert means.residual_moment is None
        target = corrected_target(streams.weight, *means, alpha=1, beta=1, damping=0.01)
        expected = raw_target(streams, "none", 0.01, residual=False)
        torch.testing.assert_close(target, expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize(("rms_scale", "beta"), [("none", 0), ("none", 1), ("common", 1), ("split", 1)])
    def test_objective_minus_rounding_loss_is_constant(self, rms_scale: RmsScale, beta: int) -> None:
        """Rounding the target under the returned second moment is rounding for the true objective."""
        streams = random_streams()
        target = target_of(streams, rms_scale, beta=beta, damping=0)
        moment = moments_of(streams, rms_scale).means().second_moment * streams.x.shape[0]
        d, dq = (s[:, None] for s in streams.scales(rms_scale))
        goal = d * (beta * streams.r + streams.x @ streams.weight.T)
        g = torch.Generator().manual_seed(1)
        constants, sizes = [], []
        for _ in range(20):
            rounded = streams.weight + torch.randn(streams.weight.shape, generator=g, dtype=torch.float64)
            objective = (dq * (beta * streams.rq + streams.xq @ rounded.T) - goal).square().sum()
            gap = rounded - target
            constants.append(objective - ((gap @ moment) * gap).sum())
            sizes.append(objective)
        spread = torch.stack(constants).max() - torch.stack(constants).min()
        assert spread / torch.stack(sizes).max() < 1e-11

    @pytest.mark.parametrize("rms_scale", RMS_SCALES)
    def test_norm_gain_drops_out(self, rms_scale: RmsScale) -> None:
        """The minimiser after a learned gain, solved jointly over all entries, is the target computed without it."""
        streams = random_streams(tokens=12, n=4, m=3)
        gain = torch.tensor([0.2, 3.0, 1.5], dtype=torch.float64)
        d, dq = (s[:, None] for s in streams.scales(rms_scale))
        goal = (d * (streams.r + streams.x @ streams.weight.T) - dq * streams.rq) * gain
        rows = torch.kron(dq * streams.xq, torch.diag(gain))
        joint = torch.linalg.lstsq(rows, goal.reshape(-1, 1)).solution.reshape(4, 3).T
        torch.testing.assert_close(target_of(streams, rms_scale, damping=0), joint, rtol=1e-9, atol=1e-9)

    def test_held_out_error_falls_with_every_level(self) -> None:
        """Weight > linear > sublayer on unseen tokens of a drift that is partly predictable from the inputs."""
        n, m, g = 32, 24, torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        mix, drift, spill = normal(n, n), 0.3 * normal(n, n) / n**0.5, 0.4 * normal(n, m) / n**0.5
        weight = normal(m, n) / n**0.5

        def draw(tokens: int) -> Streams:
            xq = normal(tokens, n) @ mix / n**0.5
            rq = normal(tokens, m)
            gap = xq @ spill + 0.05 * normal(tokens, m)
            return Streams(xq + xq @ drift + 0.05 * normal(tokens, n), xq, rq + gap, rq, weight)

        calibration, held_out = draw(600), draw(400)
        moment = moments_of(calibration, batch=200).means().second_moment
        errors = []
        for alpha, beta in [(0, 0), (1, 0), (1, 1)]:
            target = target_of(calibration, alpha=alpha, beta=beta)
            scale, zero_point = asym_grid(target, 3)
            codes = slow_gptq(target, moment, scale, zero_point, 3)
            rounded = scale[:, None] * (codes - zero_point[:, None])
            gap = held_out.rq + held_out.xq @ rounded.T - held_out.r - held_out.x @ weight.T
            errors.append(float(gap.square().mean()))
        assert errors[0] > 1.2 * errors[1] > 1.2 * 1.2 * errors[2]


class TestLaws:
    """Identities between members of the family."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("rms_scale", RMS_SCALES)
    def test_zero_strengths_return_the_weight_bit_for_bit(self, rms_scale: RmsScale, dtype: torch.dtype) -> None:
        streams = random_streams()
        weight = streams.weight.to(dtype)
        weight[0, 0] = -0.0
        means = [moment.to(dtype) for moment in moments_of(streams, rms_scale).means() if moment is not None]
        target = corrected_target(weight, *means, alpha=0, beta=0, damping=0.01)
        assert target.numpy().tobytes() == weight.numpy().tobytes()
        assert target.data_ptr() != weight.data_ptr()

    @pytest.mark.parametrize("damping", [0.0, 1e-6, 0.01, 1.0])
    @pytest.mark.parametrize("rms_scale", RMS_SCALES)
    def test_equal_streams_return_the_weight_for_every_damping(self, rms_scale: RmsScale, damping: float) -> None:
        streams = random_streams(tokens=5, n=7)  # fewer tokens than channels: singular H
        same = replace(streams, x=streams.xq, r=streams.rq)
        assert torch.equal(target_of(same, rms_scale, damping=damping), streams.weight)

    def test_unit_token_weights_are_the_sublayer_target(self) -> None:
        streams = random_streams()
        ones = torch.ones(streams.x.shape[0], dtype=torch.float64)
        moments = TargetMoments(7, 5, dtype=torch.float64)
        moments.add(streams.x, streams.xq, streams.r, streams.rq, TokenWeights(ones, ones))
        target = corrected_target(streams.weight, *moments.means(), alpha=1, beta=1, damping=0.01)
        torch.testing.assert_close(target, target_of(streams), rtol=1e-12, atol=1e-12)
        for rms_scale in ("common", "split"):
            assert relative_correction(target_of(streams, rms_scale), target) > 1e-3

    @pytest.mark.parametrize("rms_scale", RMS_SCALES)
    def test_right_hand_side_is_one_moment_of_the_output_error(self, rms_scale: RmsScale) -> None:
        """C W + G = X_q^T E, with E the (weighted) drift of the sublayer output at the unrounded weight."""
        streams = random_streams()
        d, dq = (s[:, None] for s in streams.scales(rms_scale))
        means = moments_of(streams, rms_scale).means()
        assert means.cross_moment is not None
        assert means.residual_moment is not None
        error = d * (streams.r + streams.x @ streams.weight.T) - dq * (streams.rq + streams.xq @ streams.weight.T)
        expected = (dq * streams.xq).T @ error / streams.x.shape[0]
        torch.testing.assert_close(
            means.cross_moment @ streams.weight.T + means.residual_moment, expected, rtol=1e-12, atol=1e-12
        )

    @pytest.mark.parametrize("rms_scale", RMS_SCALES)
    def test_strengths_scale_the_two_corrections_separately(self, rms_scale: RmsScale) -> None:
        streams = random_streams()
        input_part = target_of(streams, rms_scale, 1, 0) - streams.weight
        residual_part = target_of(streams, rms_scale, 0, 1) - streams.weight
        expected = streams.weight + 0.3 * input_part + 0.65 * residual_part
        torch.testing.assert_close(target_of(streams, rms_scale, 0.3, 0.65), expected, rtol=1e-10, atol=1e-10)

    def test_split_ignores_one_common_constant_but_not_two(self) -> None:
        streams = random_streams()
        d, dq = streams.scales("split")

        def with_weights(reference: Tensor, quantized: Tensor) -> Tensor:
            moments = TargetMoments(7, 5, dtype=torch.float64)
            moments.add(streams.x, streams.xq, streams.r, streams.rq, TokenWeights(reference, quantized))
            return corrected_target(streams.weight, *moments.means(), alpha=1, beta=1, damping=0.01)

        torch.testing.assert_close(with_weights(7 * d, 7 * dq), target_of(streams, "split"), rtol=1e-10, atol=1e-10)
        assert relative_correction(with_weights(d / d.mean(), 1.5 * dq / dq.mean()), target_of(streams, "split")) > 0.05

    @pytest.mark.parametrize(("rms_scale", "cancels"), [("none", True), ("common", True), ("split", False)])
    def test_bias_cancels_only_under_equal_token_weights(self, rms_scale: RmsScale, cancels: bool) -> None:
        """With split weights (D - D_q) bias survives, hence the bias belongs to both residuals."""
        streams = random_streams()
        bias = torch.linspace(-2, 2, 5, dtype=torch.float64)
        biased = replace(streams, r=streams.r + bias, rq=streams.rq + bias)
        d, dq = biased.scales(rms_scale)
        moments = TargetMoments(7, 5, dtype=torch.float64)
        moments.add(streams.x, streams.xq, streams.r, streams.rq, TokenWeights(d, dq))
        without = corrected_target(streams.weight, *moments.means(), alpha=1, beta=1, damping=0.01)
        change = relative_correction(without, target_of(biased, rms_scale))
        assert change < 1e-10 if cancels else change > 0.01
        torch.testing.assert_close(
            target_of(biased, rms_scale), raw_target(biased, rms_scale, 0.01), rtol=1e-9, atol=1e-9
        )

    @pytest.mark.parametrize(("rms_scale", "dominated"), [("none", True), ("common", False), ("split", False)])
    def test_sink_token_loses_its_pull_under_the_norm(self, rms_scale: RmsScale, dominated: bool) -> None:
        streams = random_streams()
        sink, sink_q = streams.r.clone(), streams.rq.clone()
        sink[0], sink_q[0] = 1e4 * sink[0].abs() + 300, 1e4 * sink[0].abs()
        with_sink = replace(streams, r=sink, rq=sink_q)
        without = Streams(streams.x[1:], streams.xq[1:], streams.r[1:], streams.rq[1:], streams.weight)
        change = relative_correction(target_of(with_sink, rms_scale), target_of(without, rms_scale))
        assert change > 1 if dominated else change < 1e-2

    def test_qep_is_half_a_correction_with_full_damping(self) -> None:
        streams = random_streams()
        means = moments_of(streams, residual=False).means()
        h, c, w = streams.xq.T @ streams.xq, streams.xq.T @ (streams.x - streams.xq), streams.weight.T
        expected = w + 0.5 * torch.linalg.inv(h + h.diagonal().mean() * torch.eye(7, dtype=torch.float64)) @ c @ w
        target = corrected_target(streams.weight, *means, alpha=0.5, beta=0, damping=1.0)
        torch.testing.assert_close(target, expected.T, rtol=1e-10, atol=1e-10)

    def test_linears_with_one_input_may_be_stacked(self) -> None:
        streams = random_streams()
        means = moments_of(streams, residual=False).means()
        other = streams.weight.flip(0) * 2
        both = corrected_target(torch.cat([streams.weight, other]), *means, alpha=1, beta=0, damping=0.01)
        parts = [corrected_target(w, *means, alpha=1, beta=0, damping=0.01) for w in (streams.weight, other)]
        torch.testing.assert_close(both, torch.cat(parts), rtol=1e-12, atol=1e-12)

    def test_common_scaling_of_the_moments_is_irrelevant(self) -> None:
        streams = random_streams()
        means = [1e3 * moment for moment in moments_of(streams, "split").means() if moment is not None]
        target = corrected_target(streams.weight, *means, alpha=1, beta=1, damping=0.05)
        torch.testing.assert_close(target, target_of(streams, "split", damping=0.05), rtol=1e-10, atol=1e-10)

    def test_damping_shrinks_the_correction_to_zero(self) -> None:
        streams = random_streams()
        norms = [relative_correction(target_of(streams, damping=d), streams.weight) for d in (0, 0.01, 0.1, 1, 1e9)]
        assert norms == sorted(norms, reverse=True)
        assert norms[0] > 0.1
        assert norms[-1] < 1e-8


class TestEdges:
    """Dead channels, dtypes, bad input."""

    @pytest.mark.parametrize("damping", [0.0, 0.05])
    def test_dead_channel_keeps_its_column_and_leaves_the_others_alone(self, damping: float) -> None:
        """Result = the target of the problem without that channel, at the same absolute lambda."""
        streams = random_streams()
        streams.xq[:, 2] = 0  # the full-precision channel is alive: C has a column, H does not
        rest = [0, 1, 3, 4, 5, 6]
        reduced = Streams(streams.x[:, rest], streams.xq[:, rest], streams.r, streams.rq, streams.weight[:, rest])
        target = target_of(streams, damping=damping)
        assert torch.equal(target[:, 2], streams.weight[:, 2])
        torch.testing.assert_close(target[:, rest], target_of(reduced, damping=damping * 6 / 7), rtol=1e-9, atol=1e-9)

    def test_rows_of_the_cross_moments_at_a_dead_channel_are_ignored(self) -> None:
        streams = random_streams()
        streams.xq[:, 2] = 0
        h, c, g = (moment for moment in moments_of(streams).means() if moment is not None)
        clean = corrected_target(streams.weight, h, c, g, alpha=1, beta=1, damping=0.01)
        c[2], g[2] = 9.0, -9.0
        assert torch.equal(corrected_target(streams.weight, h, c, g, alpha=1, beta=1, damping=0.01), clean)

    def test_no_signal_at_all_returns_the_weight(self) -> None:
        weight, zero = torch.arange(12.0).view(3, 4), torch.zeros(4, 4)
        assert torch.equal(corrected_target(weight, zero, zero + 1, alpha=1, beta=1, damping=0.01), weight)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_narrow_streams_are_accumulated_and_solved_in_float32(self, dtype: torch.dtype) -> None:
        streams = random_streams()
        narrow = Streams(*(getattr(streams, name).to(dtype) for name in ("x", "xq", "r", "rq", "weight")))
        exact = Streams(*(getattr(narrow, name).double() for name in ("x", "xq", "r", "rq", "weight")))
        moments = TargetMoments(7, 5)
        shaped = [part.reshape(4, 10, -1) for part in (narrow.x, narrow.xq, narrow.r, narrow.rq)]
        out, out_q = shaped[0].float() @ narrow.weight.float().T, shaped[1].float() @ narrow.weight.float().T
        moments.add(*shaped, token_weights("split", shaped[2] + out, shaped[3] + out_q, eps=EPS))
        target = corrected_target(narrow.weight, *moments.means(), alpha=1, beta=1, damping=0.01)
        assert target.dtype == torch.float32
        torch.testing.assert_close(target.double(), target_of(exact, "split"), rtol=1e-4, atol=1e-4)

    def test_batches_do_not_matter(self) -> None:
        whole, streamed = (moments_of(random_streams(), "split", batch=batch).means() for batch in (40, 3))
        for one, many in zip(whole, streamed, strict=True):
            torch.testing.assert_close(one, many, rtol=1e-12, atol=1e-12)

    def test_inputs_are_not_modified(self) -> None:
        streams = random_streams()
        streams.xq[:, 2] = 0
        parts = [streams.x, streams.xq, streams.r, streams.rq, streams.weight]
        before = [part.clone() for part in parts]
        moments = moments_of(streams, "split").means()
        frozen = [moment.clone() for moment in moments if moment is not None]
        corrected_target(streams.weight, *moments, alpha=1, beta=1, damping=0.01)
        assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(moments, frozen, strict=True) if a is not None)

    @pytest.mark.parametrize("which", [0, 1, 2, 3])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_non_finite_argument_is_named(self, which: int, value: float) -> None:
        streams = random_streams()
        means = moments_of(streams).means()
        arguments = [streams.weight.clone(), *(moment.clone() for moment in means if moment is not None)]
        arguments[which][1, 1] = value
        name = ["weight", "second_moment", "cross_moment", "residual_moment"][which]
        with pytest.raises(NumericalError, match=name):
            corrected_target(*arguments, alpha=0, beta=0, damping=0.01)

    def test_non_finite_token_is_found_when_the_moments_are_read(self) -> None:
        streams = random_streams()
        streams.xq[3, 1] = torch.nan
        with pytest.raises(NumericalError, match="second_moment"):
            moments_of(streams).means()

    def test_singular_moment_names_the_damping(self) -> None:
        moment = torch.ones(3, 3, dtype=torch.float64)
        moment[2, 2] = 0.5  # indefinite
        with pytest.raises(NumericalError, match=r"damping 0\.001"):
            corrected_target(torch.eye(3), moment, torch.eye(3), alpha=1, beta=0, damping=0.001)

    def test_pivot_of_rounding_noise_is_refused_not_amplified(self) -> None:
        """Two equal channels up to one float32 epsilon: the factorisation runs through, its result means nothing."""
        moment = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2.0**-23]])
        assert int(torch.linalg.cholesky_ex(moment).info) == 0
        with pytest.raises(NumericalError, match="damping 0 "):
            corrected_target(torch.eye(2), moment, torch.eye(2), alpha=1, beta=0, damping=0.0)
        assert corrected_target(torch.eye(2), moment, torch.eye(2), alpha=1, beta=0, damping=0.01).abs().max() < 1e3

    def test_wrong_shapes_are_named(self) -> None:
        eye = torch.eye(4)
        with pytest.raises(ConfigError, match="second_moment"):
            corrected_target(torch.ones(3, 4), torch.eye(3), None, alpha=1, beta=0, damping=0.01)
        with pytest.raises(ConfigError, match="residual_moment"):
            corrected_target(torch.ones(3, 4), eye, eye, torch.ones(3, 4), alpha=1, beta=0, damping=0.01)

    def test_overflowing_solution_names_the_damping(self) -> None:
        tensor = torch.full((1, 1), 1e10)
        with pytest.raises(NumericalError, match=r"not finite at damping 0"):
            corrected_target(torch.ones(1, 1), torch.full((1, 1), 1e-30), tensor, alpha=1, beta=0, damping=0)

    def test_misaligned_streams_are_refused(self) -> None:
        streams = random_streams()
        moments = TargetMoments(7, 5, dtype=torch.float64)
        ones = torch.ones(39)
        with pytest.raises(CalibrationError, match="inputs of shape"):
            moments.add(streams.x[:1], streams.xq, streams.r, streams.rq)
        with pytest.raises(CalibrationError, match="residual_q of shape"):
            moments.add(streams.x, streams.xq, streams.r)
        with pytest.raises(CalibrationError, match=r"weights\.reference"):
            moments.add(streams.x, streams.xq, streams.r, streams.rq, TokenWeights(ones, ones))
        with pytest.raises(CalibrationError, match="out_features"):
            TargetMoments(7).add(streams.x, streams.xq, streams.r, streams.rq)
        with pytest.raises(CalibrationError, match="at least one"):
            moments.means()

    def test_token_weights(self) -> None:
        hidden = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
        assert inverse_rms(hidden, 0.25).tolist() == pytest.approx([12.75**-0.5, 2.0])
        common = token_weights("common", hidden, 2 * hidden, eps=0.25)
        split = token_weights("split", hidden, 2 * hidden, eps=0.25)
        assert common is not None
        assert split is not None
        assert torch.equal(common.reference, common.quantized)
        assert split.quantized.tolist() == pytest.approx([50.25**-0.5, 2.0])
        assert token_weights("none", hidden, hidden, eps=0.25) is None
        with pytest.raises(ConfigError, match="rms_scale"):
            token_weights("both", hidden, hidden, eps=0.25)  # type: ignore[arg-type]

    def test_relative_correction(self) -> None:
        assert relative_correction(torch.tensor([[3.0, 1.0]]), torch.tensor([[3.0, 4.0]])) == pytest.approx(0.6)
        assert relative_correction(torch.zeros(1, 2), torch.zeros(1, 2)) == 0
        assert relative_correction(torch.ones(1, 2), torch.zeros(1, 2)) == float("inf")
