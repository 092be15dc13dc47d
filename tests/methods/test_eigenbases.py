"""Eigenbases gather what they should, from moments that are those of the installed model."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ptqbench.methods.basis import FoldedBasis
from ptqbench.models.capture import read_moments
from transforms_at_hand import LINEARS, TRANSFORMS, WINDOWS, cell, in_basis, member, open_model


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


def test_pre_fuse_compensation_uses_the_gain_of_the_checkpoint(checkpoint, tmp_path):
    model = open_model(checkpoint())
    name, options = TRANSFORMS["joint"]
    plain = in_basis(model, member(name, **options), cell(), tmp_path / "plain").basis
    compensated = in_basis(model, member(name, **options, pre_fuse_compensation=True), cell(), tmp_path / "gain").basis
    assert not torch.allclose(plain.attention_basis(0), compensated.attention_basis(0))
    assert torch.equal(plain.key_basis(0), compensated.key_basis(0))
