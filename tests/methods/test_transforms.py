"""Transforms: the same function at 16 bits, the published grids below, bases that gather what they should."""

import copy
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from given_windows import GivenWindows
from ptqbench.cell.folders import conf_folder
from ptqbench.cell.registry import complete, create
from ptqbench.cell.spec import RoleSpec, RunSpec, build, to_dict
from ptqbench.engine import bases
from ptqbench.engine.bases import Shelf, compute_bases
from ptqbench.engine.rotations import Preparation
from ptqbench.errors import ConfigError, NumericalError, UnsupportedError
from ptqbench.methods.basis import FoldedBasis
from ptqbench.models.architecture import Architecture, published
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.capture import read_moments
from ptqbench.models.quantized import set_quantizers
from ptqbench.models.source import ModelSource
from ptqbench.models.stages import forward
from ptqbench.numerics.hadamard import hadamard_matrix
from ptqbench.runs.artefacts import Artefacts
from ptqbench.runs.attempt import Silent

VARIANTS = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1, "intermediate_size": 172}),
    ("llama", {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 2, "attention_bias": True}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 8}),
    ("qwen3", {"head_dim": 32, "num_attention_heads": 12, "num_key_value_heads": 3, "tie_word_embeddings": True}),
]
OFF = {"r1": "none", "r2": False, "r3": False, "r4": False, "head_mix": "none"}
TRANSFORMS = {
    "folding": ("hadamard", OFF),
    "r1": ("hadamard", OFF | {"r1": "random_hadamard"}),
    "r1 haar": ("hadamard", OFF | {"r1": "haar"}),
    "r1 bare": ("hadamard", OFF | {"r1": "hadamard"}),
    "r2": ("hadamard", OFF | {"r2": True}),
    "r3": ("hadamard", OFF | {"r3": True}),
    "r4": ("hadamard", OFF | {"r4": True}),
    "head mixing": ("hadamard", OFF | {"head_mix": "hadamard"}),
    "quarot": ("hadamard", {}),
    "full_shared": ("subspace", {}),
    "one_per_decoder": ("subspace", {"granularity": "one_per_decoder"}),
    "per_layer": ("subspace", {"granularity": "per_layer"}),
    "iso": ("subspace", {"iso_bits": True, "high_bits": 6}),
    "joint": ("subspace", {"objective": "joint", "granularity": "per_layer"}),
    "outlier": ("subspace", {"objective": "outlier", "granularity": "per_layer"}),
    "output per token": ("subspace", {"output_group": "token"}),
    "learned": ("learned_rotation", {"steps": 2, "init": "haar", "r3": False}),
    "learned inside the parts": ("subspace", {"learned_rotation": True, "learning_steps": 2}),
    "joint everywhere": (
        "subspace",
        {"objective": "joint", "granularity": "per_layer", "kv_joint": True, "pre_fuse_compensation": True},
    ),
}
BROAD = ("r2", "quarot", "full_shared", "one_per_decoder", "per_layer", "outlier", "learned")
TOKENS = torch.randint(0, 100, (2, 24), generator=torch.Generator().manual_seed(1))
WINDOWS = torch.randint(0, 100, (4, 32), generator=torch.Generator().manual_seed(2))
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
           "mlp.down_proj")  # fmt: skip


def cell(w=4, a=4, k=4, v=4, solver="gptq", seed=0, weight_groups=None, grid=None, **activation):
    role = lambda name: {"name": name, "options": {}}
    return build(RunSpec, {
        "model": {"name": "m"},
        "method": {
            "name": "m", "transform": role("none"), "target": role("weight"), "solver": role(solver),
            "refine": role("none"), "grid": grid or {"scheme": "sym_signed", "clip_search": True}, "activation": activation,
            "true_sequential": True,
        },
        "bitwidth": {"name": "b", "w_bits": w, "a_bits": a, "k_bits": k, "v_bits": v, "group_size": weight_groups},
        "calibration": None, "evaluation": {"name": "e"}, "seed": seed,
    })  # fmt: skip


def member(name, **options):
    return create("transform", RoleSpec(name, options))


def open_model(folder, dtype=torch.float64):
    return BlockwiseModel(ModelSource(folder), dtype, torch.device("cpu"))


def in_basis(model, transform, spec, folder):
    """Open a model in the basis of a transform; eigenbases are computed in ``folder``."""
    bases = Preparation(model, spec, folder, "test", Silent(), GivenWindows(WINDOWS)).of(transform)
    return model.reopened(transform.basis(spec, model.architecture, bases))


@torch.no_grad()
def logits(model, quantizers=True):
    hidden, positions = model.embed(TOKENS), model.positions(TOKENS.shape[1])
    for index in range(model.n_blocks):
        with model.block(index) as block:
            set_quantizers(block, quantizers)
            hidden = forward(block, hidden, positions)
    with model.head() as head:
        return head(hidden)


@pytest.fixture(autouse=True)
def one_thread():
    """Small factorisations are hundreds of times slower when the threads of a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def float64_norms(monkeypatch):
    """The installed norms compute in float32; laws to 1e-8 need the same formula in float64."""

    def exact(self, hidden):
        wide = hidden.double()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(hidden.dtype)

    for cls in (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(cls, "forward", exact)


# --- the function stays ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_logits_stay_in_float64(checkpoint, tmp_path, float64_norms, kind, changes):
    model = open_model(checkpoint(kind, **changes))
    expected = logits(model)
    for label in TRANSFORMS if kind == "qwen2" else BROAD:
        name, options = TRANSFORMS[label]
        transform = member(name, **options)
        rotated = in_basis(model, transform, cell(), tmp_path / label)
        error = (logits(rotated, quantizers=False) - expected).abs().max() / expected.abs().max()
        assert error <= 1e-8, f"{label}, quantizers off: {error}"
        if label in ("quarot", "full_shared", "per_layer"):
            rotated = in_basis(model, transform, cell(16, 16, 16, 16), tmp_path / label)
            error = (logits(rotated) - expected).abs().max() / expected.abs().max()
            assert error <= 1e-8, f"{label}, 16 bits: {error}"


@pytest.mark.parametrize("label", ["quarot", "full_shared", "per_layer"])
def test_logits_stay_in_float32_through_the_installed_norms(checkpoint, tmp_path, label):
    model = open_model(checkpoint("qwen2"), torch.float32)
    expected = logits(model)
    name, options = TRANSFORMS[label]
    found = logits(in_basis(model, member(name, **options), cell(), tmp_path / "bases"), quantizers=False)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("label", ["quarot", "full_shared", "joint"])
def test_quantizers_are_installed_and_the_materialised_model_is_the_streamed_one(checkpoint, tmp_path, label):
    model = open_model(checkpoint("qwen2", tie_word_embeddings=True), torch.float32)
    name, options = TRANSFORMS[label]
    rotated = in_basis(model, member(name, **options), cell(), tmp_path / "bases")
    streamed, exact = logits(rotated), logits(model)
    assert (streamed - exact).norm() > 0.01 * exact.norm()
    whole = rotated.reopened(rotated.basis).materialise()
    assert whole.config.tie_word_embeddings is False
    with torch.no_grad():
        torch.testing.assert_close(whole(TOKENS).logits, streamed, rtol=0, atol=0)


def test_without_a_transform_there_is_nothing_to_install_or_only_quantizers(checkpoint):
    model = open_model(checkpoint("llama", tie_word_embeddings=True), torch.float32)
    transform = member("none")
    assert transform.basis(cell(4, 16, 16, 16), model.architecture) is None
    quantized = model.reopened(transform.basis(cell(4, 4, 16, 16), model.architecture))
    assert torch.equal(logits(quantized, quantizers=False), logits(model))
    assert not torch.equal(logits(quantized), logits(model))
    whole = quantized.reopened(quantized.basis).materialise()
    assert whole.lm_head.weight.data_ptr() == whole.model.embed_tokens.weight.data_ptr(), "nothing asks for untying"
    with torch.no_grad():
        assert torch.equal(whole(TOKENS).logits, logits(quantized))


def test_a_published_odd_factor_that_is_no_hadamard_still_cancels(checkpoint, tmp_path, float64_norms):
    model = open_model(checkpoint("llama", intermediate_size=76, hidden_size=48))  # 38 x 2 in the codes
    expected = logits(model)
    for name in ("hadamard", "subspace"):
        rotated = in_basis(model, member(name, odd_hadamard="as_code"), cell(), tmp_path / name)
        assert (logits(rotated, quantizers=False) - expected).abs().max() <= 1e-8 * expected.abs().max()
    paley = in_basis(model, member("hadamard"), cell(), tmp_path).basis.block(model.tensors(0), 0)
    as_code = in_basis(model, member("hadamard", odd_hadamard="as_code"), cell(), tmp_path).basis.block(
        model.tensors(0), 0
    )
    assert not torch.allclose(paley["mlp.down_proj.weight"], as_code["mlp.down_proj.weight"])


# --- randomness --------------------------------------------------------------------------------------------------------


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


def test_centring_is_an_option_of_the_embedding_alone(checkpoint, tmp_path):
    model = open_model(checkpoint("llama", tie_word_embeddings=True))
    for name in ("hadamard", "subspace"):
        plain, centred = (
            in_basis(model, member(name, center_embedding=on), cell(), tmp_path / f"{name}{on}").basis
            for on in (False, True)
        )
        rows = model.embed(torch.arange(5)[None])[0]
        back = {"hadamard": lambda b: b.residual, "subspace": lambda b: b.attention_basis(0)}[name]
        assert torch.allclose(plain.embedding({"weight": rows})["weight"] @ back(plain).T, rows)
        found = centred.embedding({"weight": rows})["weight"] @ back(centred).T
        assert torch.allclose(found, rows - rows.mean(1, keepdim=True))
        if name == "subspace":
            assert not torch.allclose(plain.bases["residual"], centred.bases["residual"]), (
                "the stream is that of the rows"
            )
        head = {"norm.weight": torch.ones(48), "lm_head.weight": rows}
        assert torch.allclose(centred.head(head)["lm_head.weight"] @ back(centred).T, rows)


def test_both_objectives_share_their_random_factors(checkpoint, tmp_path):
    model = open_model(checkpoint())
    resq = in_basis(model, member("subspace", granularity="per_layer"), cell(), tmp_path / "resq").basis
    name, options = TRANSFORMS["joint"]
    coquant = in_basis(model, member(name, **options), cell(seed=5), tmp_path / "coquant").basis
    assert torch.equal(resq.residual_rotation, coquant.residual_rotation)
    assert torch.equal(resq.head_rotation, coquant.head_rotation)
    assert torch.equal(resq.value_basis(0), coquant.value_basis(0)), "only the residual bases differ"
    assert not torch.allclose(resq.attention_basis(0), coquant.attention_basis(0))


# --- eigenbases --------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("granularity", ["full_shared", "one_per_decoder", "per_layer"])
def test_high_parts_hold_the_top_eigenspaces(checkpoint, tmp_path, granularity):
    folder = checkpoint("qwen2")
    model = open_model(folder)
    basis = in_basis(model, member("subspace", granularity=granularity), cell(), tmp_path / "bases").basis
    folded = model.reopened(FoldedBasis(), torch.float32)
    hidden, positions, moments = list(folded.embed(WINDOWS).split(1)), folded.positions(WINDOWS.shape[1]), []
    for index in range(2):
        with folded.block(index) as block:
            found, hidden = read_moments(block, hidden, positions, torch.device("cpu"))
            moments.append(found)
    mean = sum(m.attention + m.mlp for m in moments) / 4
    for index, its in enumerate(moments):
        both = (its.attention + its.mlp) / 2
        residual = {"full_shared": (mean, mean), "one_per_decoder": (both, both), "per_layer": (its.attention, its.mlp)}
        attention, mlp = residual[granularity]
        check_span(basis.attention_basis(index), attention, 6)
        check_span(basis.mlp_basis(index), mlp, 6)
        key = its.key.mean(0).expand(2, -1, -1) if granularity == "full_shared" else its.key
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


@pytest.mark.parametrize("label", ["full_shared", "per_layer"])
def test_stored_bases_are_found_resumed_and_guarded(checkpoint, tmp_path, monkeypatch, label):
    model, folder = open_model(checkpoint(), torch.float32), tmp_path / "bases"
    transform, done = member(TRANSFORMS[label][0], **TRANSFORMS[label][1]), []
    first = compute_bases(transform, model, WINDOWS, cell(), folder, "mine", done.append)
    everything = {name: first[name] for name in first}
    assert done == [0, 1]
    assert len(first) == (4 + 1 if label == "full_shared" else 8)
    (folder / "basis_0001.safetensors").unlink()
    resumed = compute_bases(transform, model, WINDOWS, cell(), folder, "mine")
    assert all(torch.equal(resumed[name], basis) for name, basis in everything.items())
    with pytest.raises(ConfigError, match="belongs to mine, not yours"):
        compute_bases(transform, model, WINDOWS, cell(), folder, "yours")
    monkeypatch.setattr(BlockwiseModel, "reopened", lambda *_: pytest.fail("a finished pass must not run again"))
    compute_bases(transform, model, WINDOWS, cell(), folder, "mine")


SHELF = {"model": {"digest": "sha256:1"}, "calibration": {"n_samples": 2}, "seed": 0, "device": "cpu"}


@pytest.mark.parametrize("label", ["full_shared", "per_layer", "joint"])
def test_cells_share_moments_and_bases(checkpoint, tmp_path, monkeypatch, label):
    """With another cell's artefacts the same bases come out, to the bit, without running the model."""
    model, shelf = open_model(checkpoint(), torch.float32), lambda: Shelf(Artefacts(tmp_path / "shared"), SHELF)
    name, options = TRANSFORMS[label]
    alone = compute_bases(member(name, **options), model, WINDOWS, cell(), tmp_path / "alone", "alone")
    first, ran = shelf(), []
    compute_bases(
        member("subspace", granularity="one_per_decoder"),
        model,
        WINDOWS,
        cell(),
        tmp_path / "x",
        "x",
        ran.append,
        first,
    )
    assert ran == [0, 1]
    assert first.artefacts.made == 2
    blocks = []
    real = BlockwiseModel.block
    monkeypatch.setattr(BlockwiseModel, "block", lambda self, *a, **k: blocks.append(a) or real(self, *a, **k))
    after = compute_bases(member(name, **options), model, WINDOWS, cell(), tmp_path / "after", "after", shelf=shelf())
    assert not blocks, "another method's moments are enough"
    monkeypatch.setattr("ptqbench.engine.bases.eigenbases", lambda *_: pytest.fail("the bases are there already"))
    again = member(name, **options, rotation_seed=7, high_bits=6)
    seeded = compute_bases(again, model, WINDOWS, cell(seed=3), tmp_path / "seeded", "seeded", shelf=shelf())
    for found in (after, seeded):
        assert set(found) == set(alone)
        assert all(torch.equal(found[key], alone[key]) for key in alone)


def test_found_bases_cost_what_they_and_their_moments_took(checkpoint, tmp_path, monkeypatch):
    """On a clock of 10 s per block's moments and 1 s per basis: who finds anything is spared the same as who pays for it."""
    now, model = SimpleNamespace(seconds=0.0), open_model(checkpoint(), torch.float32)
    monkeypatch.setattr(
        "ptqbench.runs.artefacts.time", SimpleNamespace(perf_counter=lambda: now.seconds, time=time.time)
    )

    def slow(name, seconds):
        real = getattr(bases, name)

        def call(*given):
            now.seconds += seconds
            return real(*given)

        monkeypatch.setattr(bases, name, call)

    for name, seconds in {"read_moments": 10, "eigenbases": 1, "diagonalised": 1}.items():
        slow(name, seconds)
    accounts = []
    for number, (label, seed) in enumerate([("full_shared", 0), ("joint", 0), ("joint", 7), ("full_shared", 7)]):
        name, options = TRANSFORMS[label]
        shelf, start = Shelf(Artefacts(tmp_path / "shared"), SHELF), now.seconds
        transform = member(name, **options, rotation_seed=seed)
        compute_bases(transform, model, WINDOWS, cell(), tmp_path / f"{number}", "x", shelf=shelf)
        accounts.append((now.seconds - start, shelf.artefacts.spared_s))
    assert accounts == [(23, 0), (2, 20), (0, 22), (0, 23)]


def test_moments_are_shared_only_where_they_are_the_same(checkpoint, tmp_path):
    model = open_model(checkpoint(), torch.float32)
    made = []
    for number, (key, options) in enumerate(
        [(SHELF, {}), (SHELF, {"center_embedding": True}), (SHELF | {"seed": 1}, {}), (SHELF | {"device": "cuda"}, {})]
    ):
        shelf = Shelf(Artefacts(tmp_path / "shared"), key)
        compute_bases(member("subspace", **options), model, WINDOWS, cell(), tmp_path / f"{number}", "x", shelf=shelf)
        made.append(shelf.artefacts.made)
    assert made == [2, 2, 2, 2]


def test_a_shared_pass_that_was_cut_short_goes_on(checkpoint, tmp_path, monkeypatch):
    """Of a killed pass even a cell whose blocks share one basis keeps the moments."""
    model, options = open_model(checkpoint(), torch.float32), TRANSFORMS["full_shared"][1]
    alone = compute_bases(member("subspace", **options), model, WINDOWS, cell(), tmp_path / "alone", "x")

    def stop(index):
        raise KeyboardInterrupt

    shelf = Shelf(Artefacts(tmp_path / "shared"), SHELF)
    with pytest.raises(KeyboardInterrupt):
        compute_bases(member("subspace", **options), model, WINDOWS, cell(), tmp_path / "cut", "x", stop, shelf)
    assert shelf.artefacts.made == 1
    shelf = Shelf(Artefacts(tmp_path / "shared"), SHELF)
    resumed = compute_bases(member("subspace", **options), model, WINDOWS, cell(), tmp_path / "cut", "x", shelf=shelf)
    assert (shelf.artefacts.hits, shelf.artefacts.made) == (1, 1)
    assert all(torch.equal(resumed[key], alone[key]) for key in alone)


def test_a_moment_that_is_not_finite_names_its_block(checkpoint, tmp_path, monkeypatch):
    real = bases.read_moments

    def overflowing(*given):
        moments, leaving = real(*given)
        moments.value[1] = float("inf")
        return moments, leaving

    monkeypatch.setattr(bases, "read_moments", overflowing)
    with pytest.raises(NumericalError, match=r"block 0: .*NaN or infinity"):
        compute_bases(member("subspace"), open_model(checkpoint()), WINDOWS, cell(), tmp_path / "bases", "x")


# --- grids -------------------------------------------------------------------------------------------------------------

SHAPE = Architecture(
    hidden_size=48, n_blocks=2, n_heads=4, n_kv_heads=2, head_dim=16, intermediate_size=76, vocab_size=9,
    tied_embeddings=False, qkv_bias=False, qk_norm=False,
)  # fmt: skip


def ranges(precision, name):
    return [(part.start, part.stop, part.spec.bits) for part in precision.weight_grid(name)]


def test_weight_grids_split_by_importance():
    precision = member("subspace").precision(cell(), SHAPE)
    for name in ("qkv", "gate_up", *LINEARS[:3], *LINEARS[4:6]):
        assert ranges(precision, name) == [(0, 42, 4), (42, 48, 8)]
    assert ranges(precision, "o") == ranges(precision, "self_attn.o_proj") == [(0, 56, 4), (56, 64, 8)]
    assert ranges(precision, "down") == [(0, 76, 4)]
    assert all(part.spec.clip_search and part.spec.scheme == "sym_signed" for part in precision.weight_grid("qkv"))
    grouped = member("hadamard").precision(cell(weight_groups=12), SHAPE).weight_grid("down")
    assert [part.spec.group_size for part in grouped] == [12]
    with pytest.raises(ConfigError, match="lm_head"):
        precision.weight_grid("lm_head")


@pytest.mark.parametrize(
    ("options", "bits", "expected"),
    [
        ({"high_fraction": 0.0}, 4, [(0, 48, 4)]),
        ({"high_fraction": 1.0}, 4, [(0, 48, 8)]),
        ({"high_bits": 4}, 4, [(0, 42, 4), (42, 48, 4)]),
        ({}, 16, [(0, 42, 16), (42, 48, 16)]),
        ({"iso_bits": True, "high_bits": 6}, 4, [(0, 6, 2), (6, 42, 4), (42, 48, 6)]),
    ],
)
def test_weight_grid_limits(options, bits, expected):
    assert ranges(member("subspace", **options).precision(cell(w=bits), SHAPE), "qkv") == expected


def test_the_lowest_part_is_asymmetric_except_with_rounding_to_nearest():
    schemes = lambda solver: [
        part.spec.scheme
        for part in member("subspace", iso_bits=True, high_bits=6)
        .precision(cell(solver=solver), SHAPE)
        .weight_grid("o")
    ]
    assert schemes("gptq") == ["asym", "sym_signed", "sym_signed"]
    assert schemes("rtn") == ["sym_signed"] * 3


def test_subspace_plan_follows_the_codes():
    plan = member("subspace", granularity="per_layer").precision(cell(), SHAPE).block_plan(
        {"mlp.down_proj": torch.neg}, torch.zeros(2, 16, 16), (torch.eye(48), None)
    )  # fmt: skip
    general, output, down = (plan.inputs[name] for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"))
    assert (general.grid.bits, general.grid.high_bits, general.grid.n_high, general.n_groups) == (4, 8, 6, 1)
    assert general.grid.range_contains_zero
    assert general.order is None
    assert (output.grid.bits, output.grid.high_bits, output.grid.n_high, output.n_groups) == (4, 8, 2, 4)
    assert not output.grid.range_contains_zero
    assert output.order[:3].tolist() == [0, 1, 2]
    assert output.order[-8:].tolist() == [14, 15, 30, 31, 46, 47, 62, 63]
    assert (down.grid.bits, down.grid.n_high, down.grid.range_contains_zero, down.online) == (4, 0, True, torch.neg)
    key, value = plan.kv.key_grid, plan.kv.value_grid
    assert (key.bits, key.high_bits, key.n_high, key.range_contains_zero) == (4, 8, 2, True)
    assert (value.bits, value.high_bits, value.n_high, value.range_contains_zero) == (4, 8, 2, False)
    assert (plan.kv.rotation_bits, plan.kv.rope_output_bits) == (8, 8)
    first, second = plan.basis_changes
    assert second is None
    assert (first.grid.bits, first.grid.n_high, first.grid.range_contains_zero) == (8, 0, True)


@pytest.mark.parametrize(
    ("bits", "inputs", "key", "value", "change"),
    [((16, 16, 16), False, False, False, False), ((4, 16, 16), True, False, False, True),
     ((16, 4, 16), False, True, False, False), ((16, 16, 4), False, False, True, True)],
)  # fmt: skip
def test_each_bitwidth_installs_its_own_quantizers(bits, inputs, key, value, change):
    a, k, v = bits
    precision = member("subspace").precision(cell(4, a, k, v), SHAPE)
    plan = precision.block_plan({}, torch.zeros(2, 16, 16), (torch.eye(48), None))
    assert (plan.inputs["self_attn.o_proj"].grid is not None) == inputs
    assert plan.inputs["self_attn.o_proj"].order is not None, "columns of o are reordered whatever the bits"
    assert ("mlp.up_proj" in plan.inputs) == inputs
    assert (plan.kv is not None) == (key or value)
    if plan.kv is not None:
        assert (plan.kv.rotation is not None) == (plan.kv.key_grid is not None) == key
        assert (plan.kv.value_grid is not None) == value
    assert (plan.basis_changes[0].grid is not None) == change


@pytest.mark.parametrize("name", ["none", "hadamard"])
def test_uniform_transforms_quantize_per_token_and_per_head(name):
    options = dict(symmetric=True, clip_ratio=0.9, kv_clip_ratio=0.95, k_group="token")
    precision = member(name).precision(cell(4, 5, 6, 7, **options), SHAPE)
    plan = precision.block_plan()
    assert set(plan.inputs) == set(LINEARS)
    for input_plan in plan.inputs.values():
        grid = input_plan.grid
        assert (grid.bits, grid.symmetric, grid.clip_ratio, grid.n_high, input_plan.n_groups) == (5, True, 0.9, 0, 1)
        assert input_plan.order is None
    key, value = plan.kv.key_grid, plan.kv.value_grid
    assert (key.bits, key.symmetric, key.clip_ratio, key.range_contains_zero) == (6, False, 0.95, True)
    assert (value.bits, value.symmetric, value.clip_ratio, value.range_contains_zero) == (7, False, 0.95, False)
    assert (plan.kv.k_group, plan.kv.rotation_bits, plan.kv.rope_output_bits) == ("token", 16, 16)
    assert ranges(precision, "o") == [(0, 64, 4)]


@pytest.mark.parametrize("name", ["hadamard", "subspace"])
def test_int8_down_proj(name):
    precision = member(name, int8_down_proj=True).precision(cell(), SHAPE)
    assert ranges(precision, "down") == [(0, 76, 8)]
    assert precision.block_plan().inputs["mlp.down_proj"].grid.bits == 8
    untouched = member(name, int8_down_proj=True).precision(cell(16, 16), SHAPE)
    assert ranges(untouched, "down") == [(0, 76, 16)]


def test_online_transforms_are_installed_where_they_belong():
    plan = member("hadamard").basis(cell(16, 16, 16, 16), SHAPE).plan(0)
    assert set(plan.inputs) == {"self_attn.o_proj", "mlp.down_proj"}
    assert plan.kv is None
    fused = member("hadamard", head_mix="none", r4=False).basis(cell(16, 16, 16, 16), SHAPE)
    assert fused.plan(0) is None
    assert member("hadamard").basis(cell(16, 16, 4, 16), SHAPE).plan(0).kv.rotation.shape == (2, 16, 16)
    assert member("hadamard", r3=False).basis(cell(16, 16, 4, 16), SHAPE).plan(0).kv.rotation is None


# --- storage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "codes", "with_changes"),
    [
        ("llama-3.2-1b", 4.362, 6.57),
        ("llama-3.2-3b", 4.375, 7.38),
        ("llama-3-8b", 4.365, 6.83),
        ("qwen2.5-7b", 4.354, 6.12),
    ],
)
def test_golden_storage_bits(model, codes, with_changes):
    shape = published()[model]
    shared = member("subspace").precision(cell(), shape).storage_bits()
    assert shared.nominal_w_bits == 4.5
    assert shared.code_w_bits == pytest.approx(codes, abs=6e-4)
    assert shared.basis_change_w_bits == 0
    assert shared.code_w_bits < shared.effective_w_bits < shared.code_w_bits + 0.05, (
        "scales of one grid per row and part"
    )
    per_layer = member("subspace", granularity="per_layer").precision(cell(), shape).storage_bits()
    assert per_layer.code_w_bits + per_layer.basis_change_w_bits == pytest.approx(with_changes, abs=6e-3)
    assert per_layer.effective_w_bits == pytest.approx(shared.effective_w_bits + per_layer.basis_change_w_bits)
    once = member("subspace", granularity="one_per_decoder").precision(cell(), shape).storage_bits()
    assert once.basis_change_w_bits == pytest.approx(per_layer.basis_change_w_bits / 2)


@pytest.mark.parametrize(
    ("model", "codes"),
    [
        ("llama-3.2-1b", 4.362),
        ("llama-3.2-3b", 4.375),
        ("llama-3-8b", 4.365),
        ("qwen2.5-0.5b", 4.354),
        ("qwen2.5-7b", 4.354),
    ],
)
def test_golden_code_bits(model, codes):
    assert member("subspace").precision(cell(), published()[model]).storage_bits().code_w_bits == pytest.approx(
        codes, abs=5e-4
    )


@pytest.mark.parametrize(
    ("model", "bits"), [("llama-3.2-1b", 6.57), ("llama-3.2-3b", 7.38), ("llama-3-8b", 6.83), ("qwen2.5-7b", 6.12)]
)
def test_golden_code_bits_with_basis_changes(model, bits):
    stored = member("subspace", granularity="per_layer").precision(cell(), published()[model]).storage_bits()
    assert stored.code_w_bits + stored.basis_change_w_bits == pytest.approx(bits, abs=5.1e-3)


def test_code_bits_limits():
    shape = published()["qwen3-0.6b"]  # H e = 2048 differs from d = 1024
    assert (shape.hidden_size, shape.q_dim) == (1024, 2048)

    def code_bits(**options):
        return member("subspace", **options).precision(cell(), shape).storage_bits().code_w_bits

    counts = {name: rows * columns for name, (rows, columns) in shape.linear_shapes().items()}
    share = counts["mlp.down_proj"] / sum(counts.values())
    assert code_bits(high_fraction=0.0) == 4
    assert code_bits(high_bits=4) == 4
    assert code_bits(high_fraction=1.0) == pytest.approx(8 - 4 * share)
    assert code_bits() == pytest.approx(4.5 - 0.5 * share)
    assert code_bits(high_fraction=0.0, int8_down_proj=True) == pytest.approx(4 + 4 * share)


def test_golden_nominal_bits():
    def nominal(**options):
        return member("subspace", **options).precision(cell(), published()["llama-3-8b"]).storage_bits().nominal_w_bits

    assert nominal() == 4.5
    assert nominal(iso_bits=True, high_bits=6) == 4.0
    assert (nominal(high_fraction=0.0), nominal(high_fraction=1.0)) == (4, 8)


def test_iso_split():
    layout = member("subspace", iso_bits=True, high_bits=6).layout()
    assert layout.parts(64) == (8, 48, 8)
    assert layout.parts(12) == (1, 10, 1)
    with pytest.raises(UnsupportedError):
        layout.parts(7)


def test_golden_cache_bits():
    small, large = published()["llama-3.2-1b"], published()["llama-3-8b"]  # head_dim 64 and 128
    assert member("subspace").precision(cell(), small).storage_bits().k_bits == 4.5 + 1.0
    assert member("subspace").precision(cell(), large).storage_bits().v_bits == 4.5 + 0.5
    assert member("hadamard").precision(cell(), large).storage_bits().k_bits == 4 + 32 / 128
    assert member("hadamard").precision(cell(kv_symmetric=True), large).storage_bits().k_bits == 4 + 16 / 128
    token = member("hadamard").precision(cell(k_group="token"), large).storage_bits()
    assert (token.k_bits, token.v_bits) == (4 + 32 / 1024, 4 + 32 / 128)
    assert member("none").precision(cell(4, 16, 16, 16), large).storage_bits().k_bits == 16
    assert member("subspace", iso_bits=True, high_bits=6).precision(cell(), large).storage_bits().nominal_w_bits == 4


# --- impossible requests -----------------------------------------------------------------------------------------------


def shape(**changes):
    return Architecture(**(vars(SHAPE) | changes))


@pytest.mark.parametrize(
    ("name", "options", "changes", "words"),
    [
        ("hadamard", {}, {"n_heads": 14, "n_kv_heads": 2}, r"head_mix.*14"),
        ("hadamard", {}, {"head_dim": 24}, r"r2 and r3.*24"),
        ("hadamard", {"r2": False}, {"head_dim": 24}, r"r2 and r3.*24"),
        ("hadamard", {}, {"intermediate_size": 90}, r"r4.*90"),
        ("hadamard", {"odd_hadamard": "table"}, {"intermediate_size": 4864}, r"r4.*4864"),
        ("hadamard", {}, {"hidden_size": 50}, r"r1=random_hadamard.*50"),
        ("subspace", {}, {"intermediate_size": 90}, r"down_proj.*90"),
        ("subspace", {"objective": "joint"}, {}, "only with granularity=per_layer"),
        ("subspace", {"objective": "outlier"}, {}, "only with granularity=per_layer"),
        ("subspace", {"objective": "joint", "granularity": "one_per_decoder"}, {}, "only with granularity=per_layer"),
    ],
)
def test_impossible_cells_are_skipped_with_a_reason(name, options, changes, words):
    import re

    reason = member(name, **options).skip_reason(cell(), shape(**changes))
    assert reason is not None
    assert re.search(words, reason), reason
    assert member(name, **{k: v for k, v in options.items() if k == "r2"}).skip_reason(cell(), SHAPE) is None


def test_ways_out_of_a_skipped_cell():
    assert member("hadamard", head_mix="none").skip_reason(cell(), shape(n_heads=14)) is None
    assert member("hadamard", r2=False, r3=False).skip_reason(cell(), shape(head_dim=24)) is None
    assert member("hadamard", r2=False).skip_reason(cell(k=16), shape(head_dim=24)) is None, "r3 needs quantized keys"
    assert member("hadamard", r1="haar").skip_reason(cell(), shape(hidden_size=50)) is None
    assert member("hadamard", r4=False).skip_reason(cell(), shape(intermediate_size=90)) is None


def test_four_bits_stand_in_where_the_joint_objective_would_vanish():
    joint = member("subspace", objective="joint", granularity="per_layer")
    for bits in ((16, 16, 4, 4), (16, 4), (4, 16)):
        assert joint.skip_reason(cell(*bits), SHAPE) is None
    assert [joint.low_bits(cell(*bits)) for bits in ((16, 16, 4, 4), (16, 3), (2, 16))] == [4, 3, 2]


def test_iso_bits_are_for_four_bits():
    iso = member("subspace", iso_bits=True, high_bits=6)
    assert "iso_bits" in iso.skip_reason(cell(3), SHAPE)
    assert iso.skip_reason(cell(4, 16, 4, 16), SHAPE) is None


def test_a_high_part_without_channels_is_an_error():
    with pytest.raises(UnsupportedError, match=r"int\(0\.125 \* 4\) = 0"):
        member("subspace").skip_reason(cell(), shape(head_dim=4))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_joint": True}, "objective=joint"),
        ({"pre_fuse_compensation": True}, "objective=joint"),
        ({"iso_bits": True}, "high_bits=6"),
        ({"iso_bits": True, "high_bits": 6, "granularity": "per_layer"}, "full_shared"),
        ({"high_fraction": 1.5}, "high_fraction"),
        ({"n_samples": 0}, "n_samples"),
        ({"rank": 3}, "unknown key"),
        ({"learned_rotation": True, "granularity": "per_layer"}, "granularity=full_shared"),
        ({"learned_rotation": True, "objective": "outlier"}, "objective=activation"),
    ],
)
def test_contradictory_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        member("subspace", **options)


def test_eigenbases_are_asked_for():
    with pytest.raises(ConfigError, match="compute_bases"):
        member("subspace").basis(cell(), SHAPE)


# --- configuration files -----------------------------------------------------------------------------------------------


def load_option(name):
    data = yaml.safe_load((conf_folder() / "method" / "transform" / f"{name}.yaml").read_text())
    parents = [parent for parent in data.pop("defaults", []) if parent != "_self_"]
    merged = {}
    for parent in parents:
        merged |= load_option(parent)
    return merged | data


@pytest.mark.parametrize("path", sorted((conf_folder() / "method" / "transform").glob("*.yaml")), ids=lambda p: p.stem)
def test_files_write_out_every_option_and_keep_the_defaults(path):
    given = load_option(path.stem)
    spec = complete("transform", copy.deepcopy(given))
    assert {"name": spec.name, **to_dict(create("transform", spec))} == given
    changed = {
        key for key, value in create("transform", RoleSpec(spec.name)).__dict__.items() if given.get(key) != value
    }
    expected = {
        "subspace_joint": {"objective", "granularity"},
        "subspace_activation_per_layer": {"granularity"},
        "subspace_iso": {"iso_bits", "high_bits"},
        "subspace_outlier": {"objective", "granularity"},
    }
    assert changed == expected.get(path.stem, set())
