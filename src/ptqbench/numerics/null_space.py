"""Q2N: row scales that move the rounding error towards the null space of the layer's inputs.

Objective, with P = U2 U2^T the projector on the weak eigenvectors of the input second moment S = U diag(s) U^T:

    min over alpha  || diag(alpha) Q - W_proj ||_F^2 + ridge ||alpha - 1||^2,        W_proj = W (I - P) + Q P

W_proj equals W on the signal space and Q on the null space. It is off the grid and serves as a target only. The closed
form builds neither P nor W_proj and costs O(m n r):

    alpha_i = 1 + <(W_i - Q_i) U1, Q_i U1> / (||Q_i||^2 + ridge)

Shapes: W = ``weight`` (m, n); Q = ``dequantized`` (m, n); S (n, n); s_0 >= s_1 >= ...; U1 = ``basis`` (n, r), the first
r eigenvectors; r = ``rank``; alpha = ``row_scale`` (m,). W, Q and S must share one channel order and one basis.

Source: arXiv 2506.11044; zjq0455/q2n@ef25a70. Deviations: the derived closed form above has no 1e-8 in the denominator, which
the code has; ``adam20`` takes the gradient of the same objective in its derived form, so W = Q stays at alpha = 1 exactly; a
spectrum without a rank is an explicit outcome (None); the caller undoes act_order, where the code mixes orders.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ptqbench.errors import CalibrationError, NumericalError
from ptqbench.numerics.checks import compute_dtype, require_choice, require_finite

RowScaleSolver = Literal["closed", "adam20"]

_MIN_PREFIX = 1e-12  # absolute, as in the code: below it the ratio of the rank rule is undefined
_ADAM_STEPS, _ADAM_RATE, _ADAM_BETAS, _ADAM_EPS = 20, 2e-3, (0.9, 0.999), 1e-8


class PositionMean:
    """Accumulate the position-averaged second moment of the authors' code (``moment: posavg``).

    Abar (seq_len, n) is the mean of X_s over sequences s, position by position. S = Abar^T Abar has rank at most seq_len.
    Token identities average out, and the sink of the first token dominates. ``moment: full`` is the ordinary second moment.
    """

    def __init__(
        self,
        seq_len: int,
        in_features: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate a zero sum of shape (seq_len, in_features)."""
        self.n_sequences = 0
        self.total = torch.zeros(seq_len, in_features, dtype=dtype, device=device)

    def add(self, inputs: Tensor) -> None:
        """Add whole sequences.

        Args:
            inputs: (seq_len, n) or (n_sequences, seq_len, n), any float dtype, not modified.

        Raises:
            CalibrationError: The sequence length or the width differs.
        """
        sequences = inputs.unsqueeze(0) if inputs.ndim == 2 else inputs
        if tuple(sequences.shape[1:]) != tuple(self.total.shape):
            raise CalibrationError(
                f"expected sequences of shape {tuple(self.total.shape)}, got {tuple(inputs.shape)}; "
                "moment posavg needs one fixed seq_len"
            )
        # N Abar += sum over sequences s of X_s
        self.total += sequences.to(self.total.dtype).sum(dim=0)
        self.n_sequences += sequences.shape[0]

    def second_moment(self) -> Tensor:
        """Return S = Abar^T Abar, (n, n).

        Raises:
            CalibrationError: No sequence was added.
            NumericalError: The sum holds NaN or infinity.
        """
        if self.n_sequences == 0:
            raise CalibrationError("expected at least one calibration sequence, got none; call add first")
        mean = self.total / self.n_sequences
        require_finite("position_mean", mean)
        return mean.T @ mean


def signal_rank(eigenvalues: Tensor, threshold: float) -> int | None:
    """Return the smallest r >= 2 whose prefix-suffix ratio is at most the threshold.

    psr(r) = (s_{r+1} + ... + s_{n-1}) / (s_1 + ... + s_{r-1}) over descending eigenvalues s_0, s_1, ... Neither sum holds
    s_0 (the direction of mean and sink) or s_r. An r counts only if the denominator exceeds 1e-12 (absolute).

    Args:
        eigenvalues: (n,) in any order, any float dtype, not modified; negatives count as 0.
        threshold: Largest admissible ratio, dimensionless.

    Returns:
        r in 2 .. n, or None if no r is valid (fewer than two eigenvalues, or nothing beside s_0).

    Raises:
        NumericalError: NaN or infinity.
    """
    require_finite("eigenvalues", eigenvalues)
    # s_0 >= s_1 >= ... >= 0: negative eigenvalues of a semidefinite matrix are rounding errors
    spectrum = eigenvalues.double().clamp(min=0).sort(descending=True).values
    n = spectrum.numel()
    if n < 2:
        return None
    # Numerator and denominator of psr(r) for all r at once, from running sums.
    prefix = spectrum[1:].cumsum(0)  # prefix[r - 2] = s_1 + ... + s_{r-1}, r = 2 .. n
    tails = spectrum.flip(0).cumsum(0).flip(0)  # tails[j] = s_j + ... + s_{n-1}
    suffix = torch.cat([tails[3:], tails.new_zeros(min(2, n - 1))])  # suffix[r - 2] = s_{r+1} + ...; empty from r = n-1
    # The first r with psr(r) <= threshold.
    admissible = (prefix > _MIN_PREFIX) & (suffix / prefix.clamp(min=_MIN_PREFIX) <= threshold)
    found = admissible.nonzero()
    return int(found[0]) + 2 if found.numel() else None


def signal_space(second_moment: Tensor, *, threshold: float) -> Tensor | None:
    """Diagonalise S once and split off the signal space.

    Args:
        second_moment: (n, n) symmetric S, no centring, no damping, any positive scaling; not modified.
        threshold: See `signal_rank`.

    Returns:
        U1 (n, r), orthonormal columns in order of falling eigenvalue; None when the rank rule finds no r. If
        s_{r-1} = s_r the basis is one of many valid choices. All linears that read the input (q, k, v) can share it.

    Raises:
        NumericalError: NaN or infinity in S, or the eigendecomposition did not converge.
    """
    require_finite("second_moment", second_moment)
    # S = U diag(s) U^T, s ascending as eigh returns it
    try:
        eigenvalues, vectors = torch.linalg.eigh(second_moment.to(compute_dtype(second_moment)))
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NumericalError(
            f"second_moment: expected an eigendecomposition, got none for shape {list(second_moment.shape)} ({error}); "
            "use float64 or the other moment of null_space"
        ) from error
    rank = signal_rank(eigenvalues, threshold)
    # U1: the r eigenvectors of the largest eigenvalues
    return None if rank is None else vectors.flip(1)[:, :rank].contiguous()


def null_space_row_scale(
    weight: Tensor, dequantized: Tensor, basis: Tensor, *, ridge: float, solver: RowScaleSolver = "closed"
) -> Tensor:
    """Return alpha (m,) for a given signal space.

    Args:
        weight: (m, n) reference W, any float dtype, not modified.
        dequantized: (m, n) rounded weight Q, not modified.
        basis: (n, r) U1 with orthonormal columns, not modified; r = 0 gives exactly 1, r = n the ridge regression of
            W_i on Q_i.
        ridge: Absolute, in squared weight units: it pulls rows with a small ||Q_i||^2 to 1.
        solver: ``closed``, or ``adam20``: 20 Adam steps of rate 2e-3 from 1, which stay within about .04 of 1.

    Returns:
        (m,) in float64 if an argument is float64, else float32. A zero row gets 1, also at ridge 0.

    Raises:
        ConfigError: The solver is unknown or the shapes do not fit.
        NumericalError: NaN or infinity in an argument or the result.
    """
    require_choice("solver", solver, ("closed", "adam20"))
    require_finite("weight", weight)
    require_finite("dequantized", dequantized, weight.shape)
    require_finite("basis", basis, (weight.shape[1], basis.shape[-1]))
    dtype = compute_dtype(weight, dequantized, basis)
    reference, rounded, strong = weight.to(dtype), dequantized.to(dtype), basis.to(dtype)
    # pull_i = <(W_i - Q_i) U1, Q_i U1>
    pull = (((reference - rounded) @ strong) * (rounded @ strong)).sum(dim=1)
    # stiffness_i = ||Q_i||^2 + ridge
    stiffness = rounded.square().sum(dim=1) + ridge
    # alpha_i = 1 + pull_i / stiffness_i
    if solver == "closed":
        alpha = 1 + pull / torch.where(stiffness > 0, stiffness, torch.ones_like(stiffness))
    else:
        alpha = _adam(pull, stiffness)
    require_finite("row_scale", alpha)
    return alpha


def apply_row_scale(row_scale: Tensor, tensor: Tensor) -> Tensor:
    """Multiply row i by alpha_i and round once to the dtype of the tensor.

    Args:
        row_scale: (m,) alpha, not modified.
        tensor: (m,), (m, groups) or (m, n), a scale per row or group, or the dequantized weight; not modified.

    Returns:
        A new tensor of the shape and dtype of ``tensor``. Codes and zero points need no change.
    """
    dtype = compute_dtype(row_scale, tensor)
    factor = row_scale.to(dtype).reshape(-1, *[1] * (tensor.ndim - 1))
    return (factor * tensor.to(dtype)).to(tensor.dtype)


def _adam(pull: Tensor, stiffness: Tensor) -> Tensor:
    """Run Adam on sum_i stiffness_i (alpha_i - 1)^2 - 2 pull_i (alpha_i - 1), the objective up to a constant."""
    step = torch.zeros_like(pull)  # alpha - 1
    first, second = torch.zeros_like(pull), torch.zeros_like(pull)
    b1, b2 = _ADAM_BETAS
    for k in range(1, _ADAM_STEPS + 1):
        # g = d/d alpha of the objective
        gradient = 2 * (stiffness * step - pull)
        # m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
        first = b1 * first + (1 - b1) * gradient
        second = b2 * second + (1 - b2) * gradient.square()
        # alpha <- alpha - rate (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps)
        denominator = (second / (1 - b2**k)).sqrt() + _ADAM_EPS
        step = step - _ADAM_RATE * (first / (1 - b1**k)) / denominator
    return 1 + step
