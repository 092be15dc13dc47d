"""Random orthogonal matrices and the algebra that moves them through linear layers.

Objective: for row-vector activations ``y = x W^T + b``, replace x by ``x T`` and y by ``y T'`` so that every T cancels
in exact arithmetic. The input side of a weight becomes ``W T``, its output side ``T'^T W``, its bias ``b T'``.

Shapes: weight (out_features, in_features); d hidden size; H query heads, G key/value heads, g = H / G; e head_dim;
channel h e + j is channel j of head h; H e may differ from d. A head rotation is (e, e), or (G, e, e) with one matrix
per key/value head.

Source: arXiv 2404.00456 (QuaRot) section 4 and 2412.14363 (ResQ); code spcl/QuaRot@5008669, utkarsh-dmx/
project-resq@cb87d0d. Deviations: products are always float64 and stored back in the weight's dtype; head mixing uses
the full factorisation of `hadamard`, so 24 or 56 heads work.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from ptqbench.errors import ConfigError
from ptqbench.numerics.hadamard import (
    ORTHOGONAL_ORDERS,
    OddHadamard,
    factorise_order,
    hadamard_matrix,
    hadamard_transform,
)


def generator(seed: int, name: str) -> torch.Generator:
    """Derive an independent CPU random stream from (seed, name) by SHA-256.

    Args:
        seed: Any integer, e.g. ``rotation_seed``.
        name: What the stream is for; different names give unrelated streams.

    Returns:
        A fresh generator: equal arguments, equal draws, on every platform.
    """
    # The Mersenne twister takes 32 bits.
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def haar(n: int, generator: torch.Generator) -> Tensor:
    """Draw a Haar-distributed orthogonal matrix: the Q of a Gaussian's QR, with columns times sign(diag R).

    Without the signs the distribution would depend on the QR routine's convention.

    Args:
        n: Order; 0 gives an empty matrix and draws nothing.
        generator: Source of the n^2 normal numbers.

    Returns:
        (n, n) float64 on the generator's device.
    """
    gaussian = torch.randn(n, n, dtype=torch.float64, generator=generator, device=generator.device)
    return positive_qr(gaussian)


def positive_qr(matrix: Tensor) -> Tensor:
    """Return the Q factor whose R has a non-negative diagonal, which makes it unique for full rank.

    Args:
        matrix: (..., n, n) float64, not modified.

    Returns:
        (..., n, n) orthogonal.
    """
    # M = Q R = (Q S)(S R) with S = sign(diag R)
    q, r = torch.linalg.qr(matrix)
    signed: Tensor = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)
    return signed


def nearest_orthogonal(matrix: Tensor) -> tuple[Tensor, float]:
    """Return the orthogonal matrix closest to a square one (its polar factor), and how far from orthogonal that one is.

    Args:
        matrix: (n, n) finite, any float dtype, not modified.

    Returns:
        (n, n) float64, and the largest entry of ``|M^T M - I|``: 0 for an orthogonal matrix, 1 or more for a singular one.
    """
    wide = matrix.double()
    identity = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    deviation = float((wide.mT @ wide - identity).abs().max())
    # M = U diag(s) V^T; the polar factor is U V^T
    left, _, right = torch.linalg.svd(wide)
    return left @ right, deviation


def random_hadamard(n: int, generator: torch.Generator) -> Tensor:
    """Build ``diag(s) bar H_n^T`` with random signs s: ``x -> (x * s) bar H_n^T``.

    Args:
        n: Order with a known Hadamard matrix.
        generator: Source of the n signs.

    Returns:
        (n, n) float64 orthogonal on the CPU.

    Raises:
        UnsupportedError: The order cannot be built.
    """
    # diag(s) bar H_n^T,   bar H_n = H_n / sqrt(n)
    signs = 2 * torch.randint(0, 2, (n,), generator=generator, device=generator.device).cpu() - 1
    return signs[:, None] * hadamard_matrix(n, torch.float64).T / math.sqrt(n)


def odd_factor(n: int, odd_hadamard: OddHadamard, generator: torch.Generator) -> Tensor:
    """Build the orthogonal K part of a width n = K 2^m for `hadamard.hadamard_transform`.

    Args:
        n: Width.
        odd_hadamard: ``paley`` or ``table`` (always H_K / sqrt(K)) or ``as_code``.
        generator: Source of the Haar matrix that stands for the codes' tables at K = 37, 38 or 231 (``as_code`` alone).

    Returns:
        (K, K) float64 orthogonal on the CPU.

    Raises:
        UnsupportedError: The rule has no K for this n.
    """
    # H_K / sqrt(K), or a random orthogonal matrix where K is no Hadamard order
    base, _ = factorise_order(n, odd_hadamard)
    if base in ORTHOGONAL_ORDERS:
        return haar(base, generator).cpu()
    return hadamard_matrix(base, torch.float64) / math.sqrt(base)


def fix_signs(vectors: Tensor) -> Tensor:
    """Flip columns so that the largest-magnitude entry of each is positive.

    The signs of eigenvectors differ between LAPACK builds and would change every rotation built on them. Entries within a
    share of 1e-6 of the largest magnitude count as tied, and the first of them decides, so that rounding cannot flip a column.

    Args:
        vectors: (..., n, k), one vector per column, not modified.

    Returns:
        Same shape; columns times +-1.
    """
    # The first entry of (nearly) largest magnitude of every column decides.
    magnitude = vectors.abs()
    leading = (magnitude >= (1 - 1e-6) * magnitude.amax(dim=-2, keepdim=True)).to(torch.uint8).argmax(-2, keepdim=True)
    return vectors * torch.where(vectors.gather(-2, leading) < 0, -1.0, 1.0).to(vectors.dtype)


def fold_gain(weight: Tensor, gain: Tensor) -> Tensor:
    """Absorb the gain of a norm into the linear behind it, ``W diag(gain)``; the norm's gain then becomes 1.

    Args:
        weight: (out, in), not modified.
        gain: (in,), not modified.

    Returns:
        (out, in) in the weight's dtype, multiplied in float64.
    """
    return (weight.double() * gain.double()).to(weight.dtype)


def rotate_input(weight: Tensor, rotation: Tensor) -> Tensor:
    """Return ``W T``, the weight for inputs ``x T``. The rows of an embedding rotate in the same way.

    Args:
        weight: (out, in), not modified.
        rotation: (in, in) orthogonal, not modified.

    Returns:
        (out, in) in the weight's dtype, multiplied in float64.
    """
    return (weight.double() @ rotation.double()).to(weight.dtype)


def rotate_output(weight: Tensor, rotation: Tensor) -> Tensor:
    """Return ``T^T W``, the weight whose output is ``y T``. A bias (out,) becomes ``b T``.

    Args:
        weight: (out, in) weight or (out,) bias, not modified.
        rotation: (out, out) orthogonal, not modified.

    Returns:
        Same shape and dtype as weight, multiplied in float64.
    """
    return (rotation.double().mT @ weight.double()).to(weight.dtype)


def rotate_head_outputs(weight: Tensor, rotations: Tensor) -> Tensor:
    """Rotate a value projection per key/value head: ``W_k <- T_k^T W_k``, ``b_k <- b_k T_k``.

    Args:
        weight: (G e, in) weight or (G e,) bias, not modified.
        rotations: (e, e) for all heads or (G, e, e), not modified.

    Returns:
        Same shape and dtype as weight, multiplied in float64.

    Raises:
        ConfigError: The rows are not G heads of e.
    """
    # W_k <- T_k^T W_k for all key/value heads k
    per_head = _per_head(rotations, weight.shape[0], 1)
    heads = weight.double().reshape(per_head.shape[0], per_head.shape[-1], -1)
    return (per_head.mT @ heads).reshape(weight.shape).to(weight.dtype)


def rotate_head_inputs(weight: Tensor, rotations: Tensor, heads_per_kv: int) -> Tensor:
    """Rotate an output projection per query head: the columns of head h become ``W_h T_(h // g)``.

    This cancels `rotate_head_outputs`, because attention mixes tokens and never the channels of a head.

    Args:
        weight: (out, H e), not modified.
        rotations: (e, e) for all heads or (G, e, e), not modified.
        heads_per_kv: g = H / G from the model's configuration (never from the weight's shape).

    Returns:
        (out, H e) in the weight's dtype, multiplied in float64.

    Raises:
        ConfigError: The columns are not G g heads of e.
    """
    # W_h <- W_h T_(h // g) for all query heads h
    per_head = _per_head(rotations, weight.shape[1], heads_per_kv)
    heads = weight.double().reshape(weight.shape[0], per_head.shape[0], -1)
    return torch.einsum("ohi,hij->ohj", heads, per_head).reshape(weight.shape).to(weight.dtype)


def mix_heads(x: Tensor, n_heads: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Apply ``bar H_H`` across heads: ``x (bar H_H kron I_e)^T``.

    The same call serves the weight of o_proj (offline) and the attention output that enters it (online), so that it cancels.
    With ``bar H_e`` fused into its columns, o_proj carries the full ``bar H_H kron bar H_e``.

    Args:
        x: (..., H e), not modified.
        n_heads: H.
        dtype: Arithmetic type, see `hadamard.hadamard_transform`.

    Returns:
        (..., H e) in the dtype of x.

    Raises:
        ConfigError: The last axis is no multiple of n_heads.
        UnsupportedError: No Hadamard matrix of order n_heads exists or can be built (14 heads: leave mixing out).
    """
    if x.shape[-1] % n_heads:
        raise ConfigError(f"expected a last axis divisible by {n_heads} heads, got {x.shape[-1]}")
    # (..., H, e): the transform acts on the axis of the heads, channel by channel of a head
    heads = x.reshape(*x.shape[:-1], n_heads, x.shape[-1] // n_heads)
    return hadamard_transform(heads.mT, dtype=dtype).mT.reshape(x.shape)


def _per_head(rotations: Tensor, width: int, repeats: int) -> Tensor:
    """Expand head rotations to one float64 matrix per head of an axis of this width."""
    # One matrix for all heads, or one per key/value head for each of its ``repeats`` query heads.
    head_dim = rotations.shape[-1]
    if rotations.ndim == 2:
        per_head = rotations.double().expand(width // head_dim, head_dim, head_dim)
    else:
        per_head = rotations.double().repeat_interleave(repeats, dim=0)
    if per_head.shape[0] * head_dim != width:
        raise ConfigError(
            f"expected an axis of {per_head.shape[0]} heads x {head_dim} channels for rotations of shape "
            f"{tuple(rotations.shape)}, got {width}"
        )
    return per_head
