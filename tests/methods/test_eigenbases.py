"""Eigenbases gather what they should, from moments that are those of the installed model."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ptqbench.methods.basis import FoldedBasis
from ptqbench.methods.eigenbases import eigenbases, stream_objective
from ptqbench.models.capture import BlockMoments, read_moments
from transforms_at_hand import LINEARS, SHAPE, TRANSFORMS, WINDOWS, cell, in_basis, member, open_model


def slow_moments(folder, architecture):
    """Moments of block 1 from hooks on the whole installed model, rotary embedding by its own function."""
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    seen, block = {}, whole.model.layers[1]

    def keep(name, output=True):
        return lambda module, args, result: seen.__setitem__(name, (result if output else args[0]).detach().double())

    attention = block.self_attn
    gains = {"attention": block.input_layernorm.weight.double(), "mlp": block.post_attention_layernorm.weight.double()}
    attention.q_proj.register_forward_hook(keep("attention", output=False))
    block.mlp.up_proj.register_forward_hook(keep("mlp", output=False))
    attention.v_proj.register_forward_hook(keep("value"))
    getattr(attention, "q_norm", attention.q_proj).register_forward_hook(keep("query"))
    getattr(attention, "k_norm", attention.k_proj).register_forward_hook(keep("key"))
    with torch.no_grad():
        whole(WINDOWS)
        rope = whole.model.rotary_emb(torch.zeros(1, dtype=torch.float64), torch.arange(WINDOWS.shape[1])[None])
        heads = lambda name: seen[name].reshape(*WINDOWS.shape, -1, architecture.head_dim).transpose(1, 2)
        query, key = apply_rotary_pos_emb(heads("query"), heads("key"), *rope)
    n_tokens, per_kv = WINDOWS.numel(), architecture.n_heads // architecture.n_kv_heads
    moment = lambda x: x.reshape(-1, x.shape[-1]).T @ x.reshape(-1, x.shape[-1]) / n_tokens
    result = {name: moment(seen[name] / gain) for name, gain in gains.items()}
    for name, x in (("value", heads("value")), ("key", key)):
        result[name] = torch.stack([moment(x[:, head]) for head in range(architecture.n_kv_heads)])
    summed = [sum(moment(query[:, kv * per_kv + i]) for i in range(per_kv)) for kv in range(architecture.n_kv_heads)]
    return result | {"query": torch.stack(summed)}


@pytest.mark.parametrize(("kind", "changes"), [("llama", {}), ("qwen2", {}), ("qwen3", {"head_dim": 32})])
def test_moments_are_those_of_the_installed_model(checkpoint, kind, changes):
    folder = checkpoint(kind, **changes)
    model = open_model(folder, torch.float32).reopened(FoldedBasis())
    expected = slow_moments(folder, model.architecture)
    hidden, positions = list(model.embed(WINDOWS).split(1)), model.positions(WINDOWS.shape[1])
    for index in range(2):
        with model.block(index) as block:
            stock, config = dict(vars(block.self_attn)), block.self_attn.config
            moments, hidden = read_moments(block, hidden, positions, torch.device("cpu"))
            assert block.self_attn.config is config
            assert dict(vars(block.self_attn)) == stock
    for name, moment in expected.items():
        found = getattr(moments, name)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, moment, rtol=1e-4, atol=1e-5 * float(moment.abs().max()), msg=name)


def own(both, its, mean):
    """Moments of attention, MLP and keys that a basis per norm diagonalises."""
    return its.attention, its.mlp, its.key


def of_the_block(both, its, mean):
    return both, both, its.key


def of_the_model(both, its, mean):
    return mean, mean, its.key.mean(0).expand(2, -1, -1)


@pytest.mark.parametrize(
    ("granularity", "diagonalised"),
    [("full_shared", of_the_model), ("one_per_decoder", of_the_block), ("per_layer", own)],
)
def test_high_parts_hold_the_top_eigenspaces(checkpoint, tmp_path, granularity, diagonalised):
    model = open_model(checkpoint("qwen2"))
    basis = in_basis(model, member("subspace", granularity=granularity), cell(), tmp_path / "bases").basis
    folded = model.reopened(FoldedBasis(), torch.float32)
    hidden, positions, moments = list(folded.embed(WINDOWS).split(1)), folded.positions(WINDOWS.shape[1]), []
    for index in range(2):
        with folded.block(index) as block:
            found, hidden = read_moments(block, hidden, positions, torch.device("cpu"))
            moments.append(found)
    mean = sum(m.attention + m.mlp for m in moments) / 4
    for index, its in enumerate(moments):
        attention, mlp, key = diagonalised((its.attention + its.mlp) / 2, its, mean)
        check_span(basis.attention_basis(index), attention, 6)
        check_span(basis.mlp_basis(index), mlp, 6)
        for head in range(2):
            check_span(basis.value_basis(index)[head], its.value[head], 1)  # head_dim 12: one channel of twelve
            check_span(basis.key_basis(index)[head], key[head], 1)


def check_span(basis, moment, n_high):
    """The last columns capture what the top eigenvectors capture, and mix them."""
    n = len(basis)
    assert (basis.T @ basis - torch.eye(n)).abs().max() < 1e-10
    values, vectors = torch.linalg.eigh(moment)
    high = basis[:, n - n_high :]
    assert torch.trace(high.T @ moment @ high) == pytest.approx(float(values[-n_high:].sum()), rel=1e-9)
    assert n_high == 1 or not torch.allclose(high.abs(), vectors[:, -n_high:].abs(), atol=1e-3), "not randomised"


def test_joint_bases_weigh_weights_too(checkpoint, tmp_path):
    """Objective written out: S_x / tr S_x + S_w / tr S_w for the residual stream, and for heads with kv_joint."""
    model = open_model(checkpoint("qwen3", head_dim=32))
    name, options = TRANSFORMS["joint"]
    basis = in_basis(model, member(name, **options, kv_joint=True), cell(), tmp_path / "bases").basis
    folded = model.reopened(FoldedBasis(), torch.float32)
    with folded.block(0) as block:
        its, _ = read_moments(block, list(folded.embed(WINDOWS).split(1)), folded.positions(32), torch.device("cpu"))
        w = {name: block.get_submodule(name).weight.double() for name in LINEARS}
    unit = lambda matrix: matrix / matrix.trace()
    qkv, gate_up = torch.cat([w[n] for n in LINEARS[:3]]), torch.cat([w[n] for n in LINEARS[4:6]])
    for found, x, y in ((basis.attention_basis(0), its.attention, qkv), (basis.mlp_basis(0), its.mlp, gate_up)):
        top = torch.linalg.eigh(unit(x) + unit(y.T @ y))[1][:, -6:]
        assert (found[:, -6:] @ found[:, -6:].T - top @ top.T).abs().max() < 1e-5
    for head in range(2):
        columns = w["self_attn.o_proj"][:, head * 64 : (head + 1) * 64]  # two query heads per key/value head
        read = sum(part.T @ part for part in columns.split(32, dim=1))
        for found, x, y in (
            (basis.value_basis(0), its.value, read),
            (basis.key_basis(0), its.key[head], its.query[head]),
        ):
            x = x[head] if x.ndim == 3 else x
            top = torch.linalg.eigh(unit(x) + unit(y))[1][:, -4:]
            assert (found[head][:, -4:] @ found[head][:, -4:].T - top @ top.T).abs().max() < 1e-5


def test_shared_joint_bases_weigh_every_input_alike(checkpoint, tmp_path):
    """The eigenvectors, by numpy, of the mean of S_x / tr S_x + S_w / tr S_w over the inputs and heads that share a basis."""
    model = open_model(checkpoint("qwen3", head_dim=32))
    folded = model.reopened(FoldedBasis(), torch.float32)
    hidden, positions, shares, keys = list(folded.embed(WINDOWS).split(1)), folded.positions(32), [], []
    unit = lambda matrix: (matrix / matrix.trace()).numpy()
    for index in range(2):
        with folded.block(index) as block:
            its, hidden = read_moments(block, hidden, positions, torch.device("cpu"))
            w = {name: block.get_submodule(name).weight.double() for name in LINEARS}
        for x, linears in ((its.attention, LINEARS[:3]), (its.mlp, LINEARS[4:6])):
            stacked = torch.cat([w[name] for name in linears])
            shares.append(unit(x) + unit(stacked.T @ stacked))
        keys.append([unit(its.key[head]) + unit(its.query[head]) for head in range(2)])
    for label, parts in {"joint shared": [shares, shares], "joint per block": [shares[:2], shares[2:]]}.items():
        name, options = TRANSFORMS[label]
        basis = in_basis(model, member(name, **options), cell(), tmp_path / label).basis
        for index, part in enumerate(parts):
            check_top(basis.attention_basis(index), np.mean(part, axis=0), 6)
            check_top(basis.mlp_basis(index), np.mean(part, axis=0), 6)
        if label == "joint shared":
            for index in range(2):
                for head in range(2):
                    check_top(basis.key_basis(index)[head], np.mean(keys[index], axis=0), 4)


def check_top(basis, matrix, n_high):
    """The last columns span the top eigenvectors."""
    top, high = np.linalg.eigh(matrix)[1][:, -n_high:], basis[:, -n_high:].numpy()
    assert np.abs(high @ high.T - top @ top.T).max() < 1e-5


def block_of(seed, scale=1.0):
    """Moments and tensors of a block whose two inputs are alike, with norm gains."""
    draws = torch.Generator().manual_seed(seed)
    drawn = lambda *shape: torch.randn(*shape, generator=draws, dtype=torch.float64)
    inputs, weight, gain = drawn(60, 12) * torch.linspace(0.2, 3, 12), scale * drawn(9, 12), drawn(12)
    moment = scale * inputs.T @ inputs
    tensors = {f"{norm}.weight": gain for norm in ("input_layernorm", "post_attention_layernorm")}
    tensors |= {f"{name}.weight": part for name, part in zip(LINEARS[:3], weight.split(3), strict=True)}
    tensors |= {f"{name}.weight": part for name, part in zip(LINEARS[4:6], weight.split([4, 5]), strict=True)}
    head = torch.eye(8, dtype=torch.float64)[None]
    return BlockMoments(moment, moment, head, head, head), tensors


def test_a_shared_joint_basis_of_equal_inputs_is_that_of_one_and_no_scale_moves_it():
    def bases(granularity, moments, tensors):
        transform = member("subspace", objective="joint", granularity=granularity)
        return eigenbases(transform, moments, tensors, SHAPE, 4)

    own, shared = (bases(granularity, *block_of(0)) for granularity in ("per_layer", "one_per_decoder"))
    for name in ("attention", "mlp"):
        torch.testing.assert_close(shared["residual"], own[name], rtol=0, atol=1e-10)
    assert "residual_coefficients" not in shared
    transform = member("subspace", objective="joint")
    objectives = [stream_objective(transform, *block_of(1, scale), SHAPE.family) for scale in (1.0, 100.0)]
    torch.testing.assert_close(objectives[0], objectives[1])


def test_pre_fuse_compensation_uses_the_gain_of_the_checkpoint(checkpoint, tmp_path):
    model = open_model(checkpoint())
    name, options = TRANSFORMS["joint"]
    plain = in_basis(model, member(name, **options), cell(), tmp_path / "plain").basis
    compensated = in_basis(model, member(name, **options, pre_fuse_compensation=True), cell(), tmp_path / "gain").basis
    assert not torch.allclose(plain.attention_basis(0), compensated.attention_basis(0))
    assert torch.equal(plain.key_basis(0), compensated.key_basis(0))
