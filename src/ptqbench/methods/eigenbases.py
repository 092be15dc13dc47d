"""From second moments and weights of a block to its eigenbases. ResQ and CoQuant differ only here.

Shapes: d hidden size; G key/value heads; e head_dim; bases (d, d), (G, e, e) or (e, e), float64, columns from low to high
importance. The mathematics is in ``numerics.subspace``; this module says which moment meets which weight.

A pruned model has heads or inputs that are always zero, or weights that are. The zero matrix of such a part has no preferred
basis: its basis is the identity and is marked as such.

Sources: arXiv 2412.14363 (ResQ), code utkarsh-dmx/project-resq@cb87d0d; arXiv 2604.26378 (CoQuant), code
Zachary5895/CoQuant@0e2e343.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ptqbench.models.architecture import ATTENTION_INPUT, ATTENTION_OUTPUT, MLP_INPUT

if TYPE_CHECKING:
    from torch import Tensor

    from ptqbench.methods.layout import Layout
    from ptqbench.models.architecture import Architecture
    from ptqbench.models.capture import BlockMoments
    from ptqbench.models.family import Family
    from ptqbench.models.fuse import Tensors


class Choice(Protocol):
    """Which bases: the options of ``methods.subspace.Subspace`` that are read here."""

    @property
    def objective(self) -> str: ...
    @property
    def granularity(self) -> str: ...
    @property
    def outlier_norm(self) -> str: ...
    @property
    def kv_joint(self) -> bool: ...
    @property
    def pre_fuse_compensation(self) -> bool: ...
    def layout(self) -> Layout: ...


FACTS = (IDENTITY, COEFFICIENTS, RATIO) = "_identity", "_coefficients", "_ratio"
"""Suffixes of the facts stored beside a basis: which of its matrices are the identity because what they diagonalise is zero, the
coefficients of the two moments in the joint objective, and the exponent that a search chose for a scale."""

COLUMNS_OF = {
    "attention": ATTENTION_INPUT,
    "mlp": MLP_INPUT,
    "residual": (*ATTENTION_INPUT, *MLP_INPUT),
    "value": ATTENTION_INPUT[2:],
    "key": ATTENTION_INPUT[1:2],
}
"""Basis -> linears whose layer records mention it: those that read it, or write the heads that it rotates."""


def eigenbases(
    transform: Choice, moments: BlockMoments, tensors: Tensors, architecture: Architecture, low_bits: int
) -> dict[str, Tensor]:
    """Compute the bases of one block.

    Args:
        transform: Objective, granularity and options.
        moments: Second moments of the norm-folded block, not modified.
        tensors: The block's tensors before the norms are folded, on the device of the moments; read by ``joint`` alone.
        architecture: Dimensions.
        low_bits: Bits of the bulk part, for ``joint``.

    Returns:
        ``value`` and ``key``; with them ``attention`` and ``mlp`` (``per_layer``), ``residual`` (``one_per_decoder``), or
        nothing more (``full_shared``, whose one basis needs all blocks). Beside a basis ``NAME_identity``, 1 where a matrix
        is the identity because what it diagonalises is zero (left out where none is), and for a ``joint`` basis of one input
        ``NAME_coefficients`` (..., 3): lambda_x, lambda_w and gamma_low.

    Raises:
        NumericalError: A moment is not finite.
        UnsupportedError: ``joint`` with low_bits of 16.
    """
    from ptqbench.numerics.subspace import selection_basis

    # No rotation: channels sorted by their magnitude.
    if transform.objective == "outlier":
        sizes = moments.largest if transform.outlier_norm == "linf" else moments.mean_abs
        return {name: selection_basis(size) for name, size in sizes.items()}
    # The residual stream: eigenvectors of its moment, alone or joint with that of the weights that read it.
    if transform.granularity == "per_layer" and transform.objective == "joint":
        bases = _joint_residual(transform, moments, tensors, architecture.family, low_bits)
    elif transform.granularity == "per_layer":
        bases = diagonalised("attention", moments.attention) | diagonalised("mlp", moments.mlp)
    elif transform.granularity == "one_per_decoder":
        bases = diagonalised("residual", stream_objective(transform, moments, tensors, architecture.family) / 2)
    else:
        bases = {}
    # Values and keys, head by head; one key basis for all heads where the model has one basis.
    if transform.kv_joint:
        return bases | _joint_heads(transform, moments, tensors, architecture, low_bits)
    key = moments.key.mean(0) if transform.granularity == "full_shared" else moments.key
    return bases | diagonalised("value", moments.value) | diagonalised("key", key)


def stream_objective(transform: Choice, moments: BlockMoments, tensors: Tensors, family: Family) -> Tensor:
    """Sum what the two inputs of a block ask of a basis of the residual stream that they share.

    Args:
        transform: Objective.
        moments: As for `eigenbases`.
        tensors: As for `eigenbases`.
        family: Where the block normalises.

    Returns:
        (d, d) float64: the second moments, or for ``joint`` the normalised objectives.
    """
    from ptqbench.numerics.subspace import normalised_joint_objective

    if transform.objective == "activation":
        return moments.attention + moments.mlp
    pairs = ((moment, weights) for _, _, moment, weights in _inputs_with_weights(moments, tensors, family))
    attention, mlp = (normalised_joint_objective(*pair) for pair in pairs)
    return attention + mlp


def diagonalised(name: str, moment: Tensor) -> dict[str, Tensor]:
    """Diagonalise a moment (..., n, n); a zero one gets the identity and is marked.

    Args:
        name: Name of the basis.
        moment: Not modified.

    Returns:
        ``name`` (..., n, n), and ``name_identity`` (...) uint8 where some matrix is zero.

    Raises:
        NumericalError: The moment is not finite.
    """
    import torch

    from ptqbench.numerics.subspace import eigenbasis

    # A positive semidefinite matrix is zero exactly if its trace is.
    zero = moment.diagonal(dim1=-2, dim2=-1).sum(-1) == 0
    if not bool(zero.any()):
        return {name: eigenbasis(moment)}
    # Where it is zero, diagonalise the identity instead and take its basis as it is.
    identity = torch.eye(moment.shape[-1], dtype=torch.float64, device=moment.device)
    basis = torch.where(
        zero[..., None, None], identity, eigenbasis(torch.where(zero[..., None, None], identity, moment))
    )
    return {name: basis, f"{name}{IDENTITY}": zero.to(torch.uint8)}


def facts(bases: Mapping[str, Tensor]) -> dict[str, Any]:
    """Collect the facts that are kept about the bases of one block.

    Args:
        bases: What `eigenbases` or another transform returned.

    Returns:
        Plain data: name of a basis -> ``identity``, the indices of matrices that are the identity for a zero moment, and
        ``lambda_x``, ``lambda_w``, ``gamma_low`` (one number, or one per head), or ``ratio``, the exponent that a search chose.
        Names without such facts are left out.
    """
    found: dict[str, Any] = {}
    for key, value in bases.items():
        if key.endswith(IDENTITY):
            found.setdefault(key.removesuffix(IDENTITY), {})["identity"] = (
                value.reshape(-1).nonzero().flatten().tolist()
            )
        if key.endswith(COEFFICIENTS):
            numbers = dict(zip(("lambda_x", "lambda_w", "gamma_low"), value.movedim(-1, 0).tolist(), strict=True))
            found.setdefault(key.removesuffix(COEFFICIENTS), {}).update(numbers)
        if key.endswith(RATIO):
            found.setdefault(key.removesuffix(RATIO), {})["ratio"] = float(value)
    return found


def _inputs_with_weights(
    moments: BlockMoments, tensors: Tensors, family: Family
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Name, gain of the norm, second moment, and moment sum W^T W of the linears that read it (gains folded in), of both inputs."""
    from ptqbench.models.fuse import fold_norms
    from ptqbench.numerics.subspace import weight_moment

    folded = fold_norms(tensors, family)
    for name, linears, norm, moment in (
        ("attention", ATTENTION_INPUT, family.norms.before_attention, moments.attention),
        ("mlp", MLP_INPUT, family.norms.before_mlp, moments.mlp),
    ):
        gain = family.gain_offset + tensors[f"{norm}.weight"]
        yield name, gain, moment, weight_moment(folded[f"{linear}.weight"] for linear in linears)


def _joint_residual(
    transform: Choice, moments: BlockMoments, tensors: Tensors, family: Family, low_bits: int
) -> dict[str, Tensor]:
    from ptqbench.numerics.subspace import pre_fuse_basis

    bases: dict[str, Tensor] = {}
    for name, gain, moment, weights in _inputs_with_weights(moments, tensors, family):
        n_high = transform.layout().parts(len(moment))[2]
        bases |= _joint(name, moment, weights, low_bits, n_high)
        if transform.pre_fuse_compensation and f"{name}{IDENTITY}" not in bases:
            bases[name] = pre_fuse_basis(moment, weights, gain, low_bits, n_high)
    return bases


def _joint(name: str, moment: Tensor, weights: Tensor, low_bits: int, n_high: int) -> dict[str, Tensor]:
    """Diagonalise the joint objective and keep the coefficients of its two moments."""
    import torch

    from ptqbench.numerics.subspace import joint_coefficients, joint_objective

    # lambda_x S_x + lambda_w S_w, each lambda proportional to the trace of the other moment.
    lambda_x, lambda_w, gamma = joint_coefficients(moment, weights, low_bits, n_high)
    coefficients = torch.stack([lambda_x, lambda_w, torch.full_like(lambda_x, gamma)], dim=-1)
    objective = joint_objective(moment, weights, low_bits, n_high)
    return diagonalised(name, objective) | {f"{name}{COEFFICIENTS}": coefficients}


def _joint_heads(
    transform: Choice, moments: BlockMoments, tensors: Tensors, architecture: Architecture, low_bits: int
) -> dict[str, Tensor]:
    """Compute the joint bases of values (with the columns of o that read them) and of keys (with their queries)."""
    from ptqbench.numerics.subspace import normalised_joint_objective, output_head_moments

    # The moment of o's columns beside that of the values; the moment of the queries beside that of the keys.
    head_dim = architecture.head_dim
    n_high = transform.layout().parts(head_dim)[2]
    output = output_head_moments(tensors[f"{ATTENTION_OUTPUT[0]}.weight"], architecture.n_kv_heads, head_dim)
    values = _joint("value", moments.value, output, low_bits, n_high)
    if transform.granularity == "full_shared":
        return values | diagonalised("key", normalised_joint_objective(moments.key, moments.query).mean(0))
    return values | _joint("key", moments.key, moments.query, low_bits, n_high)
