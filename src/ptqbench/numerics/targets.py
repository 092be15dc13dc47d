"""Output-aware targets (LoaQ, QEP): the weight that rounding should aim at instead of the original one.

Objective, for one linear with the inputs X_q of the quantized stream, solved for V in closed form:

    min over V  || D_q (R_q + X_q V^T) - D (R + X weight^T) ||^2,    then rounding minimises || D_q X_q (V - Q)^T ||^2.

R is the residual tensor that the output is added to (R = R_q = 0: match the linear's own output). D and D_q are diagonal and
hold one weight per token, the frozen scale of the RMSNorm behind the addition. The damped minimiser, in the layout of torch, is

    target = weight + (alpha weight C^T + beta G^T) (H + lambda I)^-1,      lambda = damping * mean diag H
    H = (D_q X_q)^T (D_q X_q)    C = (D_q X_q)^T (D X - D_q X_q)    G = (D_q X_q)^T (D R - D_q R_q)

    rms_scale none: D, D_q = 1, 1;    common: d, d;    split: d, d_q

    d = 1/rms(R + X weight^T)         d_q = 1/rms(R_q + X_q weight^T)

``none`` at alpha = beta = 1 is the sublayer target and, without a residual, the linear target. QEP is the linear target with
alpha .5 and damping 1.0 on every linear but down_proj.

Shapes (T tokens, n inputs, m outputs): X, X_q (T, n); R, R_q (T, m); weight, target (m, n); H = ``second_moment`` and
C = ``cross_moment`` (n, n), whose transpose is the drift moment of GPTAQ; G = ``residual_moment`` (n, m).

Sources: LoaQ arXiv 2509.06297 (no public code) as restated in LPCD arXiv 2512.01546; strength and damping of QEP from
arXiv 2504.09629 and FujitsuResearch/qep@344329a. The formulas of ``common`` and ``split`` are derived. Deviations:
damping pulls towards the weight, not towards zero, so equal streams give exactly the weight; alpha and beta scale the
two parts of the *weighted* right-hand side. alpha scales the X part with its change of token scale, beta the R part, so that
(1, 1) is the minimiser and (0, 0) the weight itself.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ptqbench.errors import CalibrationError, NumericalError
from ptqbench.numerics.checks import compute_dtype, require_choice, require_finite
from ptqbench.numerics.factorisation import cholesky
from ptqbench.numerics.report import quotient

RmsScale = Literal["none", "common", "split"]
DeadChannels = Literal["zero", "keep_column"]


class TokenWeights(NamedTuple):
    """One positive weight per token for each stream, float32 or float64, shape (T,)."""

    reference: Tensor
    quantized: Tensor


def inverse_rms(hidden: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean_j hidden_tj^2 + eps), the frozen scale of an RMSNorm, for every token.

    Args:
        hidden: (..., m) input of the norm, any float dtype, not modified.
        eps: The norm's own epsilon, in squared units of hidden.

    Returns:
        (T,) weights in float32 or float64. T is the product of the leading dimensions. A zero token gets 1 / sqrt(eps).
    """
    flat = hidden.flatten(0, -2).to(compute_dtype(hidden))
    return torch.rsqrt(flat.square().mean(dim=-1) + eps)


def token_weights(rms_scale: RmsScale, hidden: Tensor, hidden_q: Tensor, *, eps: float) -> TokenWeights | None:
    """Return the token weights of both streams for a reading of the norm-aware objective.

    Args:
        rms_scale: ``none`` (unweighted), ``common`` (both streams weighted by the full-precision scale) or ``split``
            (each stream by its own scale).
        hidden: (..., m) full-precision input of the norm: residual + output of the linear, bias included; not modified.
        hidden_q: (..., m) the same in the quantized stream, where the linear itself is still unrounded; not modified.
        eps: Epsilon of the norm that follows the addition.

    Returns:
        None for ``none``, else one weight per token and stream.

    Raises:
        ConfigError: rms_scale is unknown.
    """
    require_choice("rms_scale", rms_scale, ("none", "common", "split"))
    if rms_scale == "none":
        return None
    # d = 1/rms(R + X weight^T),   d_q = d (common) or 1/rms(R_q + X_q weight^T) (split)
    reference = inverse_rms(hidden, eps)
    return TokenWeights(reference, reference if rms_scale == "common" else inverse_rms(hidden_q, eps))


class Moments(NamedTuple):
    """Per-token means: H (n, n), C (n, n) or None, G (n, m) or None; the moment arguments of ``corrected_target``."""

    second_moment: Tensor
    cross_moment: Tensor | None
    residual_moment: Tensor | None


class TargetMoments:
    """Accumulate H, C and G over batches. The only state is the three sums and the token count.

    One object serves every linear that reads the same input (q, k, v). For a linear whose output is added to a residual, give
    ``out_features`` and pass both residual tensors to ``add``. **A bias belongs to the residual.** It cancels for ``none`` and
    ``common`` but not for ``split``, where both residuals must contain it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        cross: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate zero sums.

        Args:
            in_features: n, the width of the linear's input.
            out_features: m, the width of the residual; None if there is no residual term.
            cross: Accumulate C; False where only the residual drift is corrected.
            dtype: dtype of the sums, float32 or float64; half precision overflows on sink tokens.
            device: Where the sums live.
        """
        self.n_tokens = 0
        self.second_sum = torch.zeros(in_features, in_features, dtype=dtype, device=device)
        self.cross_sum = torch.zeros_like(self.second_sum) if cross else None
        self.residual_sum = None
        if out_features is not None:
            self.residual_sum = torch.zeros(in_features, out_features, dtype=dtype, device=device)

    def add(
        self,
        inputs: Tensor,
        inputs_q: Tensor,
        residual: Tensor | None = None,
        residual_q: Tensor | None = None,
        weights: TokenWeights | None = None,
    ) -> None:
        """Add one token-aligned batch of both streams.

        Args:
            inputs: (..., n) full-precision inputs X, any float dtype, not modified.
            inputs_q: (..., n) quantized-stream inputs X_q of the same shape, not modified.
            residual: (..., m) R, required when ``out_features`` was given; not modified.
            residual_q: (..., m) R_q, likewise.
            weights: Token weights of this batch; None weighs every token by 1. A constant factor common to both streams has
                no effect on the target. A factor per stream does: never normalise the two separately.

        Raises:
            CalibrationError: The streams are not token-aligned, or a residual is missing or unexpected.
        """
        self._require_aligned(inputs, inputs_q, residual, residual_q, weights)
        dtype = self.second_sum.dtype
        d, d_q = (None, None) if weights is None else weights
        # H += (D_q X_q)^T (D_q X_q)
        left = _scaled(inputs_q, d_q, dtype)
        self.second_sum.addmm_(left.T, left)
        if self.cross_sum is not None:
            # C += (D_q X_q)^T (D X - D_q X_q). The drift is formed first: the difference of two moments would lose its digits.
            self.cross_sum.addmm_(left.T, _scaled(inputs, d, dtype) - left)
        if self.residual_sum is not None and residual is not None and residual_q is not None:
            # G += (D_q X_q)^T (D R - D_q R_q)
            self.residual_sum.addmm_(left.T, _scaled(residual, d, dtype) - _scaled(residual_q, d_q, dtype))
        self.n_tokens += left.shape[0]

    def means(self) -> Moments:
        """Return the sums divided by the token count, as new tensors.

        The second moment is the one that rounding must use. It is *not* divided by the mean token weight.

        Raises:
            CalibrationError: Nothing was added.
            NumericalError: A sum holds NaN or infinity.
        """
        if self.n_tokens == 0:
            raise CalibrationError("expected at least one calibration token, got none; call add before means")
        cross = None if self.cross_sum is None else self.cross_sum / self.n_tokens
        residual = None if self.residual_sum is None else self.residual_sum / self.n_tokens
        moments = Moments(self.second_sum / self.n_tokens, cross, residual)
        for name, moment in moments._asdict().items():
            if moment is not None:
                require_finite(name, moment)
        return moments

    def _require_aligned(
        self,
        inputs: Tensor,
        inputs_q: Tensor,
        residual: Tensor | None,
        residual_q: Tensor | None,
        weights: TokenWeights | None,
    ) -> None:
        tokens, width = inputs_q.shape[:-1], self.second_sum.shape[0]
        expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
            "inputs": (inputs, (*tokens, width)),
            "inputs_q": (inputs_q, (*tokens, width)),
        }
        if self.residual_sum is not None:
            wide = (*tokens, self.residual_sum.shape[1])
            expected |= {"residual": (residual, wide), "residual_q": (residual_q, wide)}
        elif residual is not None or residual_q is not None:
            raise CalibrationError("expected no residual, got one; construct TargetMoments with out_features")
        if weights is not None:
            expected |= {f"weights.{name}": (value, (tokens.numel(),)) for name, value in weights._asdict().items()}
        for name, (tensor, shape) in expected.items():
            got = None if tensor is None else tuple(tensor.shape)
            if got != shape:
                raise CalibrationError(
                    f"expected {name} of shape {shape}, got {got}; run both streams on the same batches in lock step"
                )


def corrected_target(
    weight: Tensor,
    second_moment: Tensor,
    cross_moment: Tensor | None,
    residual_moment: Tensor | None = None,
    *,
    alpha: float,
    beta: float,
    damping: float,
    dead_channels: DeadChannels = "zero",
) -> Tensor:
    """Return weight + (alpha weight C^T + beta G^T) (H + lambda I)^-1, lambda = damping * mean diag H.

    At alpha = beta = 1 it minimises || D_q (R_q + X_q V^T) - D (R + X weight^T) ||^2 + lambda || V - weight ||^2. Rows
    are independent, so linears that share their input may be stacked along the output dimension and solved at once.

    Args:
        weight: (m, n) weight, any float dtype, not modified.
        second_moment: (n, n) H of the quantized stream, any common positive scaling with C and G; not modified.
        cross_moment: (n, n) C, or None for none; not modified.
        residual_moment: (n, m) G, or None for a linear without residual (beta is then without effect); not modified.
        alpha: Strength of the input-drift correction, 0 to 1.
        beta: Strength of the residual correction, 0 to 1.
        damping: Damping of the correction as a fraction of mean diag H; the rounding step has its own.
        dead_channels: How the drift of channels without input in the quantized stream (H_ii = 0) counts: ``zero`` ignores
            their row and column of C; ``keep_column`` keeps the column, so that live channels make up for what a dead one
            contributed in full precision.

    Returns:
        (m, n) target in float64 if an argument is float64, else float32. Where the right-hand side is exactly zero (both
        strengths 0, or equal streams) it has the weight's values bit for bit, and nothing is factorised. Dead channels keep
        the weight's column; their row of C and of G is ignored.

    Raises:
        ConfigError: A moment has the wrong shape, or a choice is unknown.
        NumericalError: NaN or infinity in an argument or the result, or H + lambda I singular to working precision.
    """
    require_choice("dead_channels", dead_channels, ("zero", "keep_column"))
    out_features, n = weight.shape
    given = [
        ("weight", weight, (out_features, n)),
        ("second_moment", second_moment, (n, n)),
        ("cross_moment", cross_moment, (n, n)),
        ("residual_moment", residual_moment, (n, out_features)),
    ]
    present = [(name, tensor, shape) for name, tensor, shape in given if tensor is not None]
    for name, tensor, shape in present:
        require_finite(name, tensor, shape)
    dtype = compute_dtype(*(tensor for _, tensor, _ in present))
    base, hessian = weight.to(dtype, copy=True), second_moment.to(dtype)
    alive = hessian.diagonal() != 0
    # right = alpha weight C^T + beta G^T
    right = torch.zeros_like(base)
    if cross_moment is not None and alpha != 0:
        moved = base * alive if dead_channels == "zero" else base
        right += alpha * moved @ cross_moment.to(dtype).T
    if residual_moment is not None and beta != 0:
        right += beta * residual_moment.to(dtype).T
    # Nothing is corrected at dead channels.
    right *= alive
    if not bool(right.any()):
        return base
    # target = weight + right (H + lambda I)^-1 by the Cholesky factor of H + lambda I
    factor = _damped_factor(hessian, alive, damping)
    target = base + torch.cholesky_solve(right.T, factor).T
    if not bool(torch.isfinite(target).all()):
        raise NumericalError(f"the corrected target is not finite at damping {damping:g}; raise the correction damping")
    return target


def relative_correction(target: Tensor, weight: Tensor) -> float:
    """Return ||target - weight|| / ||weight|| (Frobenius); 0 for two zero matrices, infinity if only weight is zero."""
    wanted, given = target.double(), weight.double()
    return quotient(torch.linalg.vector_norm(wanted - given), torch.linalg.vector_norm(given))


def _scaled(tensor: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    flat = tensor.flatten(0, -2).to(dtype)
    return flat if weights is None else flat * weights.to(dtype).unsqueeze(1)


def _damped_factor(hessian: Tensor, alive: Tensor, damping: float) -> Tensor:
    """Return the lower Cholesky factor of H + lambda I, dead diagonal entries replaced by 1."""
    ridge = damping * float(hessian.diagonal().mean())
    damped = hessian.clone()
    damped.diagonal().add_(ridge)
    # A dead channel is decoupled and its right-hand side is zero, so any positive entry gives the same target.
    damped.diagonal()[~alive] = 1.0
    factor = cholesky(damped)
    if factor is None:
        raise NumericalError(
            f"second_moment: expected a positive definite matrix after damping, got a singular one of shape "
            f"{list(hessian.shape)} with correction damping {damping:g} (lambda {ridge:.3g}); raise the correction "
            "damping or use more calibration tokens"
        )
    return factor
