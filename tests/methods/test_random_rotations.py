"""Random factors of transforms: where they come from, and which rotations they are."""

import pytest
import torch

from ptqbench.numerics.hadamard import hadamard_matrix
from transforms_at_hand import SHAPE, TRANSFORMS, cell, in_basis, member, open_model


def test_rotations_come_from_the_rotation_seed_alone(checkpoint):
    model = open_model(checkpoint())
    block = lambda seed, rotation_seed: (
        member("hadamard", rotation_seed=rotation_seed)
        .basis(cell(seed=seed), model.architecture)
        .block(model.tensors(0), 0)
    )
    first, again, other = block(0, 3), block(1, 3), block(0, 4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.allclose(first["self_attn.q_proj.weight"], other["self_attn.q_proj.weight"])


def test_residual_rotations_are_the_published_ones():
    residual = lambda **options: member("hadamard", **options).basis(cell(), SHAPE).residual
    bare = hadamard_matrix(48, torch.float64).T / 48**0.5
    assert torch.allclose(residual(r1="hadamard"), bare, atol=1e-15)
    signs = (residual() * bare).sum(1)  # row i of diag(s) bar H^T is s_i times that of bar H^T
    assert torch.allclose(signs.abs(), torch.ones(48, dtype=torch.float64))
    assert 0 < int((signs < 0).sum()) < 48
    assert torch.allclose(residual(), signs[:, None] * bare, atol=1e-15)
    orthogonal = residual(r1="haar")
    assert torch.allclose(orthogonal.T @ orthogonal, torch.eye(48, dtype=torch.float64), atol=1e-12)
    assert orthogonal.abs().max() > 2 / 48**0.5
    assert residual(r1="none") is None


@pytest.fixture
def centring(checkpoint, tmp_path):
    """A function that gives a model and its bases of a transform with rows as they are and centred."""
    model = open_model(checkpoint("llama", tie_word_embeddings=True))

    def both(name):
        return model, *(
            in_basis(model, member(name, center_embedding=on), cell(), tmp_path / f"{name}{on}").basis
            for on in (False, True)
        )

    return both


@pytest.mark.parametrize(
    ("name", "rotation"),
    [("hadamard", lambda basis: basis.residual), ("subspace", lambda basis: basis.attention_basis(0))],
    ids=["hadamard", "subspace"],
)
def test_centring_is_an_option_of_the_embedding_alone(centring, name, rotation):
    model, plain, centred = centring(name)
    rows = model.embed(torch.arange(5)[None])[0]
    assert torch.allclose(plain.embedding({"weight": rows})["weight"] @ rotation(plain).T, rows)
    found = centred.embedding({"weight": rows})["weight"] @ rotation(centred).T
    assert torch.allclose(found, rows - rows.mean(1, keepdim=True))
    head = {"norm.weight": torch.ones(48), "lm_head.weight": rows}
    assert torch.allclose(centred.head(head)["lm_head.weight"] @ rotation(centred).T, rows)


def test_eigenbases_are_those_of_the_centred_stream(centring):
    _, plain, centred = centring("subspace")
    assert not torch.allclose(plain.bases["residual"], centred.bases["residual"])


def test_both_objectives_share_their_random_factors(checkpoint, tmp_path):
    model = open_model(checkpoint())
    resq = in_basis(model, member("subspace", granularity="per_layer"), cell(), tmp_path / "resq").basis
    name, options = TRANSFORMS["joint"]
    coquant = in_basis(model, member(name, **options), cell(seed=5), tmp_path / "coquant").basis
    assert torch.equal(resq.residual_rotation, coquant.residual_rotation)
    assert torch.equal(resq.head_rotation, coquant.head_rotation)
    assert torch.equal(resq.value_basis(0), coquant.value_basis(0)), "only the residual bases differ"
    assert not torch.allclose(resq.attention_basis(0), coquant.attention_basis(0))
