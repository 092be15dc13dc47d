"""Eigenbases that gather the important directions into a small high-precision part (ResQ, CoQuant).

Objective: choose an orthogonal U whose last r columns are kept at high precision. Let x and W have noise of power
``a(b) * signal / dim`` inside each part s. The expected output error is then ``sum_s gamma_s ||X U_s||^2 ||W U_s||^2``. ResQ
minimises ``tr(U_low^T S_x U_low)``. CoQuant drops the high part and linearises around the unsplit energies, which
leaves ``gamma_low tr(U_low^T (tr(S_w) S_x + tr(S_x) S_w) U_low)``. The eigenvectors of the smallest eigenvalues solve both.
A basis that several inputs share minimises the mean of their objectives: for ResQ as they are, for CoQuant each as a share of
its value without a high part (`normalised_joint_objective`).

Shapes: S_x second_moment of the input (d, d); S_w weight moment ``sum W^T W`` (d, d); r = n_high; e head_dim; r_e =
int(high_fraction e). In every basis columns run from low to high importance. Leading batch axes (key/value heads) are
allowed everywhere. Everything is computed and returned in float64.

Source: arXiv 2412.14363 (ResQ), code utkarsh-dmx/project-resq@cb87d0d; arXiv 2604.26378 (CoQuant), code
Zachary5895/CoQuant@0e2e343. Deviations: the signs of eigenvectors are fixed; a bulk precision of 16 bits (where CoQuant's
matrix is zero) and a high part that rounds to no channel are errors, where the codes return an arbitrary basis; the random
rotations come from an explicit generator. A joint basis of several inputs is ours; CoQuant's code has one per norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ptqbench.errors import ConfigError, NumericalError, UnsupportedError
from ptqbench.numerics.orthogonal import fix_signs, haar, positive_qr


def eigenbasis(matrix: Tensor, damping: float = 0.01) -> Tensor:
    """Diagonalise ``C + damping mean(diag C) I`` in float64, least important direction first, signs fixed.

    The damping does not change the eigenvectors. It keeps the routine away from a numerically indefinite matrix.

    Args:
        matrix: (..., n, n) symmetric positive semidefinite, not modified; asymmetric rounding errors are averaged out.
        damping: Fraction of the mean diagonal.

    Returns:
        (..., n, n) float64 orthogonal, eigenvectors as columns, eigenvalues ascending.

    Raises:
        NumericalError: The matrix holds NaN or infinity, or is zero, so that no basis is preferred.
    """
    symmetric = (matrix.double() + matrix.double().mT) / 2
    mean_diagonal = symmetric.diagonal(dim1=-2, dim2=-1).mean(-1)
    if not torch.isfinite(symmetric).all():
        raise NumericalError(
            f"expected a finite matrix to diagonalise, got NaN or infinity in shape {tuple(matrix.shape)}; "
            "check the calibration forward"
        )
    if not (mean_diagonal > 0).all():
        raise NumericalError(
            "expected a matrix with a positive trace to diagonalise, got mean diagonal "
            f"{mean_diagonal.min().item():.3g} "
            f"in shape {tuple(matrix.shape)}; an input or head that is always zero has no preferred basis"
        )
    # C + damping mean(diag C) I = V diag(s) V^T, s ascending
    identity = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
    _, vectors = torch.linalg.eigh(symmetric + damping * mean_diagonal[..., None, None] * identity)
    return fix_signs(vectors)


def selection_basis(importance: Tensor) -> Tensor:
    """Order channels by importance without mixing them: the basis of the outlier baseline.

    Args:
        importance: (..., n) finite, larger for channels to keep at high precision, not modified. Ties keep their order.

    Returns:
        (..., n, n) float64 permutation, column j the j-th channel from low to high importance.

    Raises:
        NumericalError: The importance holds NaN or infinity.
    """
    if not torch.isfinite(importance).all():
        raise NumericalError("expected finite channel magnitudes to select by; check the calibration forward")
    # Column j of the permutation is the unit vector of the j-th channel from low to high importance.
    order = torch.argsort(importance, dim=-1, stable=True)
    identity = torch.eye(importance.shape[-1], dtype=torch.float64, device=importance.device)
    return identity[order].mT


def weight_moment(weights: Iterable[Tensor]) -> Tensor:
    """Sum ``W^T W`` over the linears that share an input (q, k, v or gate, up), norm gains folded in.

    Args:
        weights: Non-empty iterable of (out_i, d) weights, not modified.

    Returns:
        (d, d) float64, not divided by the number of rows.

    Raises:
        ConfigError: There is nothing to sum.
    """
    terms = [weight.double().mT @ weight.double() for weight in weights]
    if not terms:
        raise ConfigError("expected at least one weight for a weight moment, got none")
    return torch.stack(terms).sum(0)


def output_head_moments(weight: Tensor, n_kv_heads: int, head_dim: int) -> Tensor:
    """Sum ``W_o[:, head]^T W_o[:, head]`` over the query heads of each key/value head (``kv_joint``, values).

    Args:
        weight: (out, H e) output projection, not modified.
        n_kv_heads: G.
        head_dim: e.

    Returns:
        (G, e, e) float64.

    Raises:
        ConfigError: The columns are not a multiple of G e.
    """
    if weight.shape[1] % (n_kv_heads * head_dim):
        raise ConfigError(
            f"expected o_proj columns in multiples of {n_kv_heads} key/value heads x {head_dim}, got {weight.shape[1]}"
        )
    # sum over outputs o and query heads g of the key/value head k: W_o[o, (k, g, i)] W_o[o, (k, g, j)]
    heads = weight.double().reshape(weight.shape[0], n_kv_heads, -1, head_dim)
    return torch.einsum("okgi,okgj->kij", heads, heads)


def noise_power(bits: int) -> float:
    """Return the relative noise power a(b) = 1 / (2^(b-1) - 1)^2; 0 from 16 bits on.

    Args:
        bits: At least 2.

    Returns:
        a(b).

    Raises:
        UnsupportedError: Fewer than 2 bits have no symmetric grid.
    """
    if bits < 2:
        raise UnsupportedError(f"expected at least 2 bits for a noise model, got {bits}")
    return 0.0 if bits >= 16 else 1.0 / (2 ** (bits - 1) - 1) ** 2


def joint_coefficients(
    second_moment: Tensor, weight_moment: Tensor, low_bits: int, n_high: int
) -> tuple[Tensor, Tensor, float]:
    """Compute CoQuant's lambda_x, lambda_w and gamma_low.

    ``gamma_low = 2 a(low_bits) / max(d - r, 1)``; ``lambda_x = gamma_low tr(S_w)``; ``lambda_w = gamma_low tr(S_x)``.

    Args:
        second_moment: S_x (..., d, d), not modified.
        weight_moment: S_w (..., d, d), not modified.
        low_bits: Bulk precision, below 16.
        n_high: r.

    Returns:
        (lambda_x, lambda_w, gamma_low); the lambdas have the batch shape.

    Raises:
        UnsupportedError: low_bits >= 16, where the objective vanishes.
    """
    if low_bits >= 16:
        raise UnsupportedError(
            f"expected fewer than 16 bulk bits for the joint objective, got {low_bits}: its matrix is zero there; "
            "use the activation objective"
        )
    # gamma_low = 2 a(b) / max(d - r, 1),   lambda_x = gamma_low tr(S_w),   lambda_w = gamma_low tr(S_x)
    gamma_low = 2 * noise_power(low_bits) / max(second_moment.shape[-1] - n_high, 1)
    return gamma_low * _trace(weight_moment), gamma_low * _trace(second_moment), gamma_low


def joint_objective(second_moment: Tensor, weight_moment: Tensor, low_bits: int, n_high: int) -> Tensor:
    """Combine both moments into the matrix that CoQuant diagonalises: ``lambda_x S_x + lambda_w S_w``.

    It is proportional to ``S_x / tr(S_x) + S_w / tr(S_w)``, so its eigenvectors depend neither on low_bits nor on n_high
    nor on the scales of the two moments. For ``kv_joint`` pass stacks (G, e, e) and r_e: for values their moments and
    `output_head_moments`, for keys their moments and the summed moments of their queries. Arguments and errors are those of
    `joint_coefficients`. The result is (..., d, d) float64.
    """
    # lambda_x S_x + lambda_w S_w
    lambda_x, lambda_w, _ = joint_coefficients(second_moment, weight_moment, low_bits, n_high)
    return lambda_x[..., None, None] * second_moment.double() + lambda_w[..., None, None] * weight_moment.double()


def normalised_joint_objective(second_moment: Tensor, weight_moment: Tensor) -> Tensor:
    """Express the joint objective as a share: ``S_x / tr(S_x) + S_w / tr(S_w)``, with trace 2.

    It is `joint_objective` over ``gamma_low tr(S_x) tr(S_w)``, half of that objective's value where no direction is kept at
    high precision. So ``tr(U_low^T N U_low) / 2`` is the share of the expected error that a basis leaves, which is comparable
    between inputs: the objective of a basis that they share is the mean of these matrices. An input that causes no error,
    because one of its moments is zero, adds nothing.

    Args:
        second_moment: S_x (..., d, d), not modified.
        weight_moment: S_w (..., d, d), not modified.

    Returns:
        (..., d, d) float64; zero where either moment is zero.
    """
    # S_x / tr(S_x) + S_w / tr(S_w)
    of_x, of_w = (_trace(moment)[..., None, None] for moment in (second_moment, weight_moment))
    share = second_moment.double() / of_x + weight_moment.double() / of_w
    return torch.where((of_x == 0) | (of_w == 0), torch.zeros_like(share), share)


def pre_fuse_basis(second_moment: Tensor, weight_moment: Tensor, gain: Tensor, low_bits: int, n_high: int) -> Tensor:
    """Build CoQuant's basis with ``pre_fuse_compensation``: solve before the norm gain, then go back behind it.

    With D = diag(gain), V diagonalises the joint objective of ``D S_x D`` and ``D^-1 S_w D^-1``. The basis is the Q of
    ``QR(D V)`` with a positive diagonal of R. Its low columns span ``D V_low`` exactly, the high ones the complement.

    Args:
        second_moment: S_x (d, d) of the unit-gain input, not modified.
        weight_moment: S_w (d, d) of the norm-folded weights, not modified.
        gain: (d,) norm gain, not modified; magnitudes below 1e-6 count as 1e-6 with the same sign (zero as positive).
        low_bits: Bulk precision, below 16.
        n_high: r.

    Returns:
        (d, d) float64 orthogonal.

    Raises:
        UnsupportedError: low_bits >= 16.
        NumericalError: A moment is zero or not finite.
    """
    # D = diag(gain)
    floored = gain.double().abs().clamp(min=1e-6) * torch.where(gain < 0, -1.0, 1.0)
    outer = floored[:, None] * floored[None, :]
    # V diagonalises the joint objective of D S_x D and D^-1 S_w D^-1
    vectors = eigenbasis(joint_objective(second_moment * outer, weight_moment / outer, low_bits, n_high))
    # Q of QR(D V)
    return positive_qr(floored[:, None] * vectors)


def random_rotations(
    hidden_parts: Sequence[int], head_parts: Sequence[int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw the rotations R1 (residual stream) and R2 (heads), Haar inside each precision part.

    They randomise within the parts only: the span of a part of ``T = U R`` equals that of U. The parts of R1 are drawn first,
    low before high, then those of R2. Use equal seeds to compare objectives.

    Args:
        hidden_parts: Part widths of the hidden size, low to high, e.g. (d - r, r); zeros allowed.
        head_parts: Part widths of the head_dim, e.g. (e - r_e, r_e).
        generator: Source of the draws.

    Returns:
        (R1 (d, d), R2 (e, e)), block diagonal, float64.
    """
    hidden = torch.block_diag(*(haar(size, generator) for size in hidden_parts))
    return hidden, torch.block_diag(*(haar(size, generator) for size in head_parts))


def _trace(matrix: Tensor) -> Tensor:
    return matrix.double().diagonal(dim1=-2, dim2=-1).sum(-1)
