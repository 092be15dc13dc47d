"""Laws of the random rotations and of the rotation algebra (on a small decoder written with plain tensors)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from ptqbench.errors import ConfigError, UnsupportedError
from ptqbench.numerics.hadamard import hadamard_matrix, hadamard_transform
from ptqbench.numerics.orthogonal import (
    fix_signs,
    fold_gain,
    generator,
    haar,
    mix_heads,
    positive_qr,
    random_hadamard,
    rotate_head_inputs,
    rotate_head_outputs,
    rotate_input,
    rotate_output,
)

# H e = 96 differs from d = 24; 12 heads and f = 40 have non-symmetric Hadamard matrices.
D, H, G, E, F, L, VOCAB, TOKENS = 24, 12, 4, 8, 40, 2, 17, 9
INPUTS = {"q": D, "k": D, "v": D, "o": H * E, "gate": D, "up": D, "down": F}
OUTPUTS = {"q": H * E, "k": G * E, "v": G * E, "o": D, "gate": F, "up": F, "down": D}


@dataclass
class Decoder:
    """Parameters and online operations of a two-block RMSNorm decoder with tied embeddings and biases everywhere."""

    embedding: Tensor
    lm_head: Tensor
    weights: list[dict[str, Tensor]]
    biases: list[dict[str, Tensor]]
    gains: list[Tensor]
    head_mix: bool = False
    key_rotation: Tensor | None = None
    down_hadamard: bool = False
    residual: dict[str, Tensor] = field(default_factory=dict)


def decoder(seed: int = 0) -> Decoder:
    g = generator(seed, "tiny")

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    weights = [{n: draw(OUTPUTS[n], INPUTS[n]) / INPUTS[n] ** 0.5 for n in INPUTS} for _ in range(L)]
    biases = [{n: draw(OUTPUTS[n]) for n in INPUTS} for _ in range(L)]
    embedding = draw(VOCAB, D)
    return Decoder(embedding, embedding, weights, biases, [1 + 0.3 * draw(D) for _ in range(2 * L + 1)])


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def rope(x: Tensor) -> Tensor:
    """Rotate (heads, tokens, e) by position, half-split layout."""
    half = E // 2
    angle = torch.arange(TOKENS).double()[:, None] * 10.0 ** -torch.arange(half).double()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def scores(model: Decoder, queries: Tensor, keys: Tensor) -> Tensor:
    q = rope(queries.reshape(TOKENS, H, E).transpose(0, 1))
    k = rope(keys.reshape(TOKENS, G, E).transpose(0, 1))
    k = k.repeat_interleave(H // G, 0)
    if model.key_rotation is not None:
        rotation = model.key_rotation.repeat_interleave(H // G, 0)
        q, k = q @ rotation, k @ rotation
    masked = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    return (q @ k.mT / E**0.5).masked_fill(masked, -torch.inf)


def logits(model: Decoder) -> Tensor:
    h = model.embedding[torch.arange(TOKENS) % VOCAB]
    eye = torch.eye(D, dtype=torch.float64)
    for i, (weight, bias) in enumerate(zip(model.weights, model.biases, strict=True)):

        def linear(name: str, x: Tensor, weight: dict = weight, bias: dict = bias) -> Tensor:
            return x @ weight[name].T + bias[name]

        x = rms(h, model.gains[2 * i])
        residual = h @ model.residual.get(f"attention{i}", eye)
        value = linear("v", x).reshape(TOKENS, G, E).transpose(0, 1).repeat_interleave(H // G, 0)
        mixed = (scores(model, linear("q", x), linear("k", x)).softmax(-1) @ value).transpose(0, 1).reshape(TOKENS, -1)
        h = residual + linear("o", mix_heads(mixed, H) if model.head_mix else mixed)
        x = rms(h, model.gains[2 * i + 1])
        residual = h @ model.residual.get(f"mlp{i}", eye)
        x = torch.nn.functional.silu(linear("gate", x)) * linear("up", x)
        h = residual + linear("down", hadamard_transform(x) if model.down_hadamard else x)
    return rms(h, model.gains[-1]) @ model.lm_head.T


def fold(model: Decoder) -> Decoder:
    weights = [dict(weight) for weight in model.weights]
    for i, weight in enumerate(weights):
        for name in "qkv":
            weight[name] = fold_gain(weight[name], model.gains[2 * i])
        for name in ("gate", "up"):
            weight[name] = fold_gain(weight[name], model.gains[2 * i + 1])
    head = fold_gain(model.lm_head, model.gains[-1])
    return dataclasses.replace(model, weights=weights, lm_head=head, gains=[torch.ones(D).double()] * (2 * L + 1))


def rotate_residual(model: Decoder, attention: list[Tensor], mlp: list[Tensor]) -> Decoder:
    """Fuse one basis per norm; attention has L + 1 entries, the last being lm_head's."""
    weights, biases = [dict(w) for w in model.weights], [dict(b) for b in model.biases]
    for i in range(L):
        for name in "qkv":
            weights[i][name] = rotate_input(weights[i][name], attention[i])
        for name in ("gate", "up"):
            weights[i][name] = rotate_input(weights[i][name], mlp[i])
        for parameters in (weights[i], biases[i]):
            parameters["o"] = rotate_output(parameters["o"], mlp[i])
            parameters["down"] = rotate_output(parameters["down"], attention[i + 1])
    changes = {f"attention{i}": attention[i].T @ mlp[i] for i in range(L)}
    changes |= {f"mlp{i}": mlp[i].T @ attention[i + 1] for i in range(L)}
    embedding, head = rotate_input(model.embedding, attention[0]), rotate_input(model.lm_head, attention[-1])
    return dataclasses.replace(
        model, embedding=embedding, lm_head=head, weights=weights, biases=biases, residual=changes
    )


def with_r1(model: Decoder) -> Decoder:
    rotation = random_hadamard(D, generator(0, "r1"))
    rotated = rotate_residual(model, [rotation] * (L + 1), [rotation] * L)
    return dataclasses.replace(rotated, residual={})


def with_per_norm_bases(model: Decoder) -> Decoder:
    g = generator(0, "bases")
    return rotate_residual(model, [haar(D, g) for _ in range(L + 1)], [haar(D, g) for _ in range(L)])


def with_r2(model: Decoder, rotations: Tensor | None = None) -> Decoder:
    rotations = hadamard_matrix(E, torch.float64).T / E**0.5 if rotations is None else rotations
    weights, biases = [dict(w) for w in model.weights], [dict(b) for b in model.biases]
    for weight, bias in zip(weights, biases, strict=True):
        weight["v"], bias["v"] = rotate_head_outputs(weight["v"], rotations), rotate_head_outputs(bias["v"], rotations)
        weight["o"] = rotate_head_inputs(weight["o"], rotations, H // G)
    return dataclasses.replace(model, weights=weights, biases=biases)


def with_kv_head_bases(model: Decoder) -> Decoder:
    g = generator(0, "heads")
    return with_r2(model, torch.stack([haar(E, g) for _ in range(G)]))


def with_head_mixing(model: Decoder) -> Decoder:
    weights = [{**weight, "o": mix_heads(weight["o"], H)} for weight in model.weights]
    return dataclasses.replace(model, weights=weights, head_mix=True)


def with_r3(model: Decoder) -> Decoder:
    g = generator(0, "keys")
    return dataclasses.replace(model, key_rotation=torch.stack([haar(E, g) for _ in range(G)]))


def with_r4(model: Decoder) -> Decoder:
    weights = [{**weight, "down": hadamard_transform(weight["down"])} for weight in model.weights]
    return dataclasses.replace(model, weights=weights, down_hadamard=True)


def all_together(model: Decoder) -> Decoder:
    return with_r4(with_r3(with_head_mixing(with_r2(with_r1(model)))))


ROTATIONS = [
    with_r1, with_per_norm_bases, with_r2, with_kv_head_bases, with_head_mixing, with_r3, with_r4, all_together
]  # fmt: skip


@pytest.mark.parametrize("rotate", ROTATIONS, ids=lambda f: f.__name__)
def test_rotations_leave_logits_unchanged(rotate) -> None:
    model = decoder()
    before = [model.embedding.clone(), *(w.clone() for w in model.weights[0].values())]
    expected = logits(model)
    rotated = rotate(fold(model))
    torch.testing.assert_close(logits(rotated), expected, atol=1e-8, rtol=0)
    assert all(map(torch.equal, before, [model.embedding, *model.weights[0].values()]))  # inputs not modified
    changed = [not torch.allclose(w, fold(model).weights[1][n]) for n, w in rotated.weights[1].items()]
    assert any(changed) or rotated.key_rotation is not None


@pytest.mark.parametrize("rotate", [with_head_mixing, with_r4], ids=lambda f: f.__name__)
def test_online_part_is_needed(rotate) -> None:
    rotated = rotate(fold(decoder()))
    offline_only = dataclasses.replace(rotated, head_mix=False, down_hadamard=False)
    assert (logits(offline_only) - logits(decoder())).abs().max() > 1e-2


def test_head_rotation_of_the_value_bias_is_needed() -> None:
    rotated = with_kv_head_bases(fold(decoder()))
    wrong = dataclasses.replace(rotated, biases=decoder().biases)
    assert (logits(wrong) - logits(decoder())).abs().max() > 1e-2


def test_folding_and_rotating_keep_dtype_and_use_float64() -> None:
    weight, gain = torch.randn(6, D).bfloat16(), torch.rand(D).bfloat16()
    rotation = haar(D, generator(0, "dtype"))
    assert torch.equal(fold_gain(weight, gain), (weight.double() * gain.double()).bfloat16())
    assert torch.equal(rotate_input(weight, rotation), (weight.double() @ rotation).bfloat16())
    assert torch.equal(rotate_output(weight.T, rotation), (rotation.T @ weight.T.double()).bfloat16())


def test_head_rotations_match_loops() -> None:
    g = generator(3, "loops")
    rotations = torch.stack([haar(E, g) for _ in range(G)])
    value, output = torch.randn(G * E, D, dtype=torch.float64), torch.randn(D, H * E, dtype=torch.float64)
    got_value, got_output = rotate_head_outputs(value, rotations), rotate_head_inputs(output, rotations, H // G)
    for k in range(G):
        rows = slice(k * E, (k + 1) * E)
        torch.testing.assert_close(got_value[rows], rotations[k].T @ value[rows], atol=1e-12, rtol=0)
    for h in range(H):
        columns = slice(h * E, (h + 1) * E)
        torch.testing.assert_close(got_output[:, columns], output[:, columns] @ rotations[h // 3], atol=1e-12, rtol=0)


def test_head_rotation_errors() -> None:
    rotations = torch.eye(E).expand(G, E, E)
    with pytest.raises(ConfigError, match="12 heads x 8"):
        rotate_head_inputs(torch.zeros(2, 80), rotations, 3)
    with pytest.raises(ConfigError):
        rotate_head_outputs(torch.zeros(E + 1, 2), torch.eye(E))


def test_head_mixing_equals_the_dense_kronecker_product() -> None:
    x = torch.randn(5, H * E, dtype=torch.float64)
    dense = torch.kron(hadamard_matrix(H, torch.float64) / H**0.5, torch.eye(E, dtype=torch.float64))
    torch.testing.assert_close(mix_heads(x, H), x @ dense.T, atol=1e-12, rtol=0)
    with_heads = torch.kron(hadamard_matrix(H, torch.float64), hadamard_matrix(E, torch.float64)) / (H * E) ** 0.5
    fused = mix_heads(rotate_head_inputs(x, hadamard_matrix(E, torch.float64).T / E**0.5, H // G), H)
    torch.testing.assert_close(fused, x @ with_heads.T, atol=1e-12, rtol=0)
    with pytest.raises(UnsupportedError, match="14"):
        mix_heads(torch.zeros(2, 14 * E), 14)
    with pytest.raises(ConfigError):
        mix_heads(x, 7)


def test_generator_depends_on_seed_and_name_only() -> None:
    def draws(seed: int, name: str) -> list[float]:
        return torch.randn(4, generator=generator(seed, name)).tolist()

    assert draws(0, "r1") == draws(0, "r1")
    assert len({tuple(draws(s, n)) for s, n in ((0, "r1"), (1, "r1"), (0, "r2"), (11, "r"), (1, "1r"))}) == 5
    state = torch.random.get_rng_state()
    haar(4, generator(0, "r1"))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("n", [1, 2, 7, 96])
def test_haar_is_the_signed_q_factor(n: int) -> None:
    rotation = haar(n, generator(5, "haar"))
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)
    gaussian = torch.randn(n, n, dtype=torch.float64, generator=generator(5, "haar"))
    upper = rotation.T @ gaussian
    assert upper.tril(-1).abs().max() < 1e-12 * n
    assert (upper.diagonal() > 0).all()
    assert torch.equal(rotation, haar(n, generator(5, "haar")))


def test_haar_entries_have_no_preferred_sign() -> None:
    """Without the signs, LAPACK's convention shifts the mean of the diagonal visibly (about 0.4 for n = 4)."""
    g = generator(0, "mean")
    diagonal = torch.stack([haar(4, g).diagonal() for _ in range(2000)]).mean(0)
    assert diagonal.abs().max() < 0.06


def test_empty_haar_draws_nothing() -> None:
    g = generator(0, "empty")
    assert haar(0, g).shape == (0, 0)
    assert torch.equal(haar(3, g), haar(3, generator(0, "empty")))


def test_random_hadamard_is_signs_then_transform() -> None:
    rotation = random_hadamard(D, generator(2, "signs"))
    signs = 2 * torch.randint(0, 2, (D,), generator=generator(2, "signs")) - 1
    assert set(signs.tolist()) == {-1, 1}
    x = torch.randn(4, D, dtype=torch.float64)
    torch.testing.assert_close(x @ rotation, hadamard_transform(x * signs), atol=1e-12, rtol=0)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(D, dtype=torch.float64), atol=1e-12, rtol=0)


def test_positive_qr_spans_leading_columns() -> None:
    matrix = torch.randn(3, 5, 5, dtype=torch.float64)
    q = positive_qr(matrix)
    upper = q.mT @ matrix
    assert upper.tril(-1).abs().max() < 1e-12
    assert (upper.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_fix_signs() -> None:
    vectors = torch.tensor([[0.6, -0.1, 0.0], [-0.8, 0.2, 0.0]])
    expected = torch.tensor([[-0.6, -0.1, 0.0], [0.8, 0.2, 0.0]])
    assert torch.equal(fix_signs(vectors), expected)
    assert torch.equal(fix_signs(-vectors), expected)
    assert torch.equal(fix_signs(vectors.expand(2, 2, 3)), expected.expand(2, 2, 3))


@pytest.mark.parametrize("noise", [-1e-9, 1e-9])
def test_fix_signs_is_stable_under_ties(noise: float) -> None:
    """Two entries of equal magnitude and opposite sign: rounding must not decide."""
    column = torch.tensor([[-0.5 + noise], [0.5], [0.1]], dtype=torch.float64)
    assert fix_signs(column)[0, 0] > 0
