"""Laws and golden numbers of the ResQ and CoQuant bases, their random rotations and their bit accounting."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ptqbench.errors import ConfigError, NumericalError, UnsupportedError
from ptqbench.numerics.bits import high_rank, kv_overhead_bits, mean_bits
from ptqbench.numerics.orthogonal import generator, haar
from ptqbench.numerics.subspace import (
    eigenbasis,
    joint_coefficients,
    joint_objective,
    noise_power,
    normalised_joint_objective,
    output_head_moments,
    pre_fuse_basis,
    random_rotations,
    weight_moment,
)


def moment(n: int, seed: int = 0, *batch: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, 3 * n, n, dtype=torch.float64, generator=g)
    x = x * torch.linspace(0.2, 3, n, dtype=torch.float64)
    return x.mT @ x / (3 * n)


def projector(vectors: Tensor) -> Tensor:
    return vectors @ vectors.mT


def matrix(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_high_rank_truncates() -> None:
    pairs = [(896, 112), (3584, 448), (2048, 256), (64, 8), (128, 16), (8, 1), (12, 1)]
    assert [(n, high_rank(n, 0.125)) for n, _ in pairs] == pairs
    assert (high_rank(64, 0), high_rank(64, 1), high_rank(4, 0)) == (0, 64, 0)


def test_high_rank_errors() -> None:
    with pytest.raises(UnsupportedError, match="width 4"):
        high_rank(4, 0.125)
    for fraction in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            high_rank(64, fraction)


# --- eigenbasis ------------------------------------------------------------------------------------------------------


def test_eigenbasis_diagonalises_in_ascending_order() -> None:
    c = moment(24)
    basis = eigenbasis(c)
    torch.testing.assert_close(basis.T @ basis, torch.eye(24, dtype=torch.float64), atol=1e-10, rtol=0)
    rotated = basis.T @ c @ basis
    torch.testing.assert_close(rotated, torch.diag(rotated.diagonal()), atol=1e-10, rtol=0)
    assert (rotated.diagonal().diff() > 0).all()
    leading = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    assert (leading > 0).all()


def test_eigenbasis_ignores_scale_damping_and_precision_of_storage() -> None:
    c = moment(16)
    assert eigenbasis(c.float()).dtype == torch.float64
    for other in (eigenbasis(7 * c), eigenbasis(c, damping=0.3)):
        torch.testing.assert_close(other, eigenbasis(c), atol=1e-10, rtol=0)


def test_eigenbasis_uses_both_triangles_and_batches() -> None:
    c = moment(8, 0, 3)
    skew = torch.randn(8, 8, dtype=torch.float64)
    torch.testing.assert_close(eigenbasis(c + skew - skew.T), eigenbasis(c), atol=1e-10, rtol=0)
    for k in range(3):
        torch.testing.assert_close(eigenbasis(c)[k], eigenbasis(c[k]), atol=1e-10, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_eigenbasis_refuses_bad_input(bad: float) -> None:
    c = moment(4)
    c[1, 2] = bad
    with pytest.raises(NumericalError, match="NaN or infinity"):
        eigenbasis(c)
    with pytest.raises(NumericalError, match="positive trace"):
        eigenbasis(torch.stack([moment(4), torch.zeros(4, 4).double()]))


# --- objectives ------------------------------------------------------------------------------------------------------


def test_weight_moment_sums_over_rows() -> None:
    weights = [torch.randn(5, 4), torch.randn(3, 4)]
    expected = sum(torch.outer(row, row) for w in weights for row in w.double())
    torch.testing.assert_close(weight_moment(weights), expected)
    with pytest.raises(ConfigError):
        weight_moment([])


def test_output_head_moments_match_a_loop() -> None:
    weight = torch.randn(7, 6 * 4)  # H = 6, G = 2, e = 4
    got = output_head_moments(weight, 2, 4)
    for k in range(2):
        heads = [weight[:, h * 4 : (h + 1) * 4].double() for h in range(3 * k, 3 * k + 3)]
        torch.testing.assert_close(got[k], sum(w.T @ w for w in heads))
    with pytest.raises(ConfigError):
        output_head_moments(weight, 5, 4)


def test_golden_noise_power() -> None:
    assert [noise_power(b) for b in (2, 3, 4, 8)] == pytest.approx([1, 0.111111, 0.0204082, 6.2000124e-5], rel=5e-6)
    assert noise_power(16) == 0
    with pytest.raises(UnsupportedError):
        noise_power(1)


def test_golden_joint_diagonal() -> None:
    s_x, s_w = torch.diag(torch.tensor([4.0, 1, 1])), torch.diag(torch.tensor([1.0, 1, 9]))
    lambda_x, lambda_w, gamma_low = joint_coefficients(s_x, s_w, 4, 1)
    assert [gamma_low, lambda_x.item(), lambda_w.item()] == pytest.approx([0.0204082, 0.2244898, 0.1224490], abs=5e-8)
    joint = joint_objective(s_x, s_w, 4, 1)
    expected = torch.diag(torch.tensor([1.020408, 0.346939, 1.326531]).double())
    torch.testing.assert_close(joint, expected, atol=5e-7, rtol=0)
    assert eigenbasis(s_x)[:, -1].tolist() == [1, 0, 0]
    assert eigenbasis(joint)[:, -1].tolist() == [0, 0, 1]


def test_golden_joint_full() -> None:
    s_x, s_w = matrix((4, 1, 0), (1, 2, 0), (0, 0, 1)), matrix((1, 0, 0), (0, 1, 2), (0, 2, 6))
    joint = joint_objective(s_x, s_w, 4, 1)
    values = torch.tensor([0.301835, 0.829726, 1.154154], dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.eigvalsh(joint), values, atol=5e-7, rtol=0)
    assert eigenbasis(joint)[:, -1].tolist() == pytest.approx([0.189710, 0.416259, 0.889235], abs=5e-7)
    assert eigenbasis(s_x)[:, -1].tolist() == pytest.approx([0.923880, 0.382683, 0], abs=5e-7)


def test_joint_equals_activation_for_isotropic_weights() -> None:
    s_x = moment(16)
    joint = eigenbasis(joint_objective(s_x, 3.7 * torch.eye(16), 4, 2))
    difference = projector(joint[:, -2:]) - projector(eigenbasis(s_x)[:, -2:])
    assert difference.abs().max() < 1e-12


def test_joint_basis_ignores_bits_rank_and_scales() -> None:
    s_x, s_w = moment(16), moment(16, 1).flip(0, 1)
    reference = eigenbasis(joint_objective(s_x, s_w, 4, 2))
    normalised = eigenbasis(s_x / s_x.trace() + s_w / s_w.trace())
    torch.testing.assert_close(reference, normalised, atol=1e-10, rtol=0)
    others = [
        joint_objective(s_x, s_w, 2, 2),
        joint_objective(s_x, s_w, 8, 15),
        joint_objective(s_x, s_w, 4, 16),
        joint_objective(1e4 * s_x, s_w, 4, 2),
        joint_objective(s_x, 1e-3 * s_w, 4, 2),
    ]
    for other in others:
        torch.testing.assert_close(eigenbasis(other), reference, atol=1e-10, rtol=0)
    assert (reference - eigenbasis(s_x)).abs().max() > 0.1


def test_joint_minimises_the_linearised_error() -> None:
    """No orthonormal frame of the low rank has less of the linearised objective than the low eigenvectors."""
    s_x, s_w, n_low = moment(12), moment(12, 1).flip(0, 1), 10

    def cost(low: Tensor) -> float:
        return (s_w.trace() * (low.T @ s_x @ low).trace() + s_x.trace() * (low.T @ s_w @ low).trace()).item()

    basis = eigenbasis(joint_objective(s_x, s_w, 4, 2))
    best = cost(basis[:, :n_low])
    g = generator(0, "frames")
    assert all(cost(haar(12, g)[:, :n_low]) > best for _ in range(50))
    assert cost(eigenbasis(s_x)[:, :n_low]) > best


def test_golden_normalised_objective() -> None:
    s_x, s_w = torch.diag(torch.tensor([4.0, 1, 1])), torch.diag(torch.tensor([1.0, 1, 9]))
    share = normalised_joint_objective(s_x, s_w)
    expected = torch.diag(torch.tensor([4 / 6 + 1 / 11, 1 / 6 + 1 / 11, 1 / 6 + 9 / 11], dtype=torch.float64))
    torch.testing.assert_close(share, expected, atol=1e-12, rtol=0)
    lambda_x, lambda_w, gamma = joint_coefficients(s_x, s_w, 4, 1)
    torch.testing.assert_close(share, joint_objective(s_x, s_w, 4, 1) * gamma / (lambda_x * lambda_w))


def test_normalised_objective_ignores_scales_and_what_causes_no_error() -> None:
    s_x, s_w = moment(8, 0, 3), moment(8, 1, 3)
    share = normalised_joint_objective(s_x, s_w)
    torch.testing.assert_close(share.diagonal(dim1=-2, dim2=-1).sum(-1), torch.full((3,), 2.0).double())
    torch.testing.assert_close(normalised_joint_objective(1e6 * s_x, 1e-6 * s_w), share)
    s_x[0], s_w[2] = 0, 0
    assert [bool(part.any()) for part in normalised_joint_objective(s_x, s_w)] == [False, True, False]
    s_x[1, 0, 0] = float("nan")
    assert normalised_joint_objective(s_x, s_w)[1].isnan().any(), "what is not finite must not pass for zero"


def test_a_basis_of_several_inputs_minimises_the_mean_of_their_shares() -> None:
    """Against numpy on the errors written out, each over its value without a high part."""
    pairs = [(10.0**i * moment(12, 2 * i), moment(12, 2 * i + 1).flip(0, 1)) for i in range(3)]
    n_low = 10

    def cost(low: Tensor) -> float:
        errors = [w.trace() * (low.T @ x @ low).trace() + x.trace() * (low.T @ w @ low).trace() for x, w in pairs]
        return sum(float(e / (2 * x.trace() * w.trace())) for e, (x, w) in zip(errors, pairs, strict=True)) / 3

    mean = torch.stack([normalised_joint_objective(*pair) for pair in pairs]).mean(0)
    basis = eigenbasis(mean)
    written_out = sum((x / x.trace() + w / w.trace()).numpy() for x, w in pairs) / 3
    values, vectors = np.linalg.eigh(written_out)
    torch.testing.assert_close(projector(basis[:, :n_low]).numpy(), vectors[:, :n_low] @ vectors[:, :n_low].T)
    assert cost(basis[:, :n_low]) == pytest.approx(values[:n_low].sum() / 2)
    g = generator(0, "frames")
    assert all(cost(haar(12, g)[:, :n_low]) > cost(basis[:, :n_low]) for _ in range(50))
    assert all(cost(eigenbasis(joint_objective(*pair, 4, 2))[:, :n_low]) > cost(basis[:, :n_low]) for pair in pairs)


def test_joint_is_batched_over_heads() -> None:
    s_x, s_w = moment(8, 0, 3), moment(8, 1, 3)
    batched = joint_objective(s_x, s_w, 4, 1)
    for k in range(3):
        torch.testing.assert_close(batched[k], joint_objective(s_x[k], s_w[k], 4, 1))


def test_joint_refuses_sixteen_bits() -> None:
    with pytest.raises(UnsupportedError, match="16 bulk bits"):
        joint_objective(moment(4), moment(4), 16, 1)


# --- pre-fuse compensation -------------------------------------------------------------------------------------------


def test_pre_fuse_with_unit_gain_is_the_joint_basis() -> None:
    s_x, s_w = moment(10), moment(10, 1).flip(0, 1)
    expected = eigenbasis(joint_objective(s_x, s_w, 4, 2))
    torch.testing.assert_close(pre_fuse_basis(s_x, s_w, torch.ones(10), 4, 2), expected, atol=1e-10, rtol=0)


def test_pre_fuse_low_subspace_is_exact() -> None:
    s_x, s_w = moment(10), moment(10, 1).flip(0, 1)
    gain = torch.linspace(-2, 3, 10, dtype=torch.float64)
    d = torch.diag(gain)
    vectors = eigenbasis(joint_objective(d @ s_x @ d, d.inverse() @ s_w @ d.inverse(), 4, 2))
    basis = pre_fuse_basis(s_x, s_w, gain, 4, 2)
    torch.testing.assert_close(basis.T @ basis, torch.eye(10, dtype=torch.float64), atol=1e-10, rtol=0)
    low, _ = torch.linalg.qr((d @ vectors)[:, :8])
    torch.testing.assert_close(projector(basis[:, :8]), projector(low), atol=1e-9, rtol=0)
    assert ((basis.T @ d @ vectors).diagonal() > 0).all()
    assert (basis - eigenbasis(joint_objective(s_x, s_w, 4, 2))).abs().max() > 0.1


def test_pre_fuse_floors_small_gains_keeping_the_sign() -> None:
    s_x, s_w = moment(6), moment(6, 1)
    tiny = torch.tensor([1.0, -1e-9, 2.0, 0.0, -1.0, 1e-12], dtype=torch.float64)
    floored = torch.tensor([1.0, -1e-6, 2.0, 1e-6, -1.0, 1e-6], dtype=torch.float64)
    assert torch.equal(pre_fuse_basis(s_x, s_w, tiny, 4, 1), pre_fuse_basis(s_x, s_w, floored, 4, 1))


# --- random rotations ------------------------------------------------------------------------------------------------


def test_random_rotations_follow_the_draw_order() -> None:
    hidden, head = random_rotations((7, 1), (3, 1), generator(0, "rotation"))
    g = generator(0, "rotation")
    r1_low, r1_high, r2_low, r2_high = (haar(n, g) for n in (7, 1, 3, 1))
    assert torch.equal(hidden, torch.block_diag(r1_low, r1_high))
    assert torch.equal(head, torch.block_diag(r2_low, r2_high))


def test_random_rotations_stay_inside_the_parts() -> None:
    basis = eigenbasis(moment(16))
    for parts in ((14, 2), (2, 12, 2), (0, 16), (16, 0)):
        hidden, _ = random_rotations(parts, (4,), generator(1, "rotation"))
        turned = basis @ hidden
        torch.testing.assert_close(turned.T @ turned, torch.eye(16, dtype=torch.float64), atol=1e-12, rtol=0)
        spans = zip(basis.split(parts, 1), turned.split(parts, 1), strict=True)
        for before, after in spans:
            torch.testing.assert_close(projector(after), projector(before), atol=1e-12, rtol=0)
        assert (turned - basis).abs().max() > 0.1


# --- bits ------------------------------------------------------------------------------------------------------------


def test_mean_bits() -> None:
    assert mean_bits(zip((8, 48, 8), (2, 4, 6), strict=True)) == 4.0
    with pytest.raises(ConfigError):
        mean_bits([])


def test_golden_kv_overhead() -> None:
    assert (kv_overhead_bits(64, 2, 32), kv_overhead_bits(128, 2, 32), kv_overhead_bits(64, 1, 32)) == (1.0, 0.5, 0.5)
