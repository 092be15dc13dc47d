"""Norms and rotations folded into tensors: the function stays, whatever the architecture."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from ptqbench.models import fuse
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.outliers import rescale_block
from ptqbench.models.quantized import BlockPlan, InputPlan
from ptqbench.models.source import ModelSource
from ptqbench.models.stages import forward
from ptqbench.numerics.orthogonal import generator, haar

VARIANTS = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1, "intermediate_size": 172}),
    ("llama", {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 2}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 8}),
    ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
]


class Rotated:
    """Every place rotated by its own Haar matrix; the stream keeps one basis."""

    unties = True

    def __init__(self, shape, places=("stream", "heads", "down", "order"), seed=0):
        stream, heads, down = (
            generator(seed, "stream"),
            generator(seed, "heads"),
            haar(shape.intermediate_size, generator(seed, "down")),
        )
        self.places = places
        self.stream = haar(shape.hidden_size, stream) if "stream" in places else None
        self.heads = torch.stack([haar(shape.head_dim, heads) for _ in range(shape.n_kv_heads)])
        self.down = lambda x: (x.double() @ down).to(x.dtype)
        self.order = torch.randperm(shape.q_dim, generator=generator(seed, "order"))
        self.per_kv = shape.n_heads // shape.n_kv_heads

    def embedding(self, tensors):
        return fuse.rotate_embedding(tensors, self.stream)

    def head(self, tensors):
        return fuse.rotate_head(tensors, self.stream)

    def block(self, tensors, index):
        rotations = fuse.BlockRotations(
            self.stream,
            self.stream,
            self.stream,
            self.stream,
            heads=self.heads if "heads" in self.places else None,
            heads_per_kv=self.per_kv,
            down=self.down if "down" in self.places else None,
            output_order=self.order if "order" in self.places else None,
        )
        return fuse.rotate_block(fuse.fold_norms(tensors), rotations)

    def plan(self, index):
        inputs = {}
        if "down" in self.places:
            inputs["mlp.down_proj"] = InputPlan(online=self.down)
        if "order" in self.places:
            inputs["self_attn.o_proj"] = InputPlan(order=self.order)
        return BlockPlan(inputs=inputs)


def open_model(folder, basis=None, dtype=torch.float64, edit=None):
    model = BlockwiseModel(ModelSource(folder), dtype, torch.device("cpu"), edit)
    return model if basis is None else model.reopened(basis(model.architecture))


@torch.no_grad()
def logits(model, tokens, overlay=None):
    hidden, positions = model.embed(tokens), model.positions(tokens.shape[1])
    for index in range(model.n_blocks):
        with model.block(index, overlay) as block:
            hidden = forward(block, hidden, positions)
    with model.head() as head:
        return head(hidden)


@pytest.fixture
def float64_norms(monkeypatch):
    """The installed norms compute in float32; laws to 1e-8 need the same formula in float64."""

    def exact(self, hidden):
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    for cls in (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(cls, "forward", exact)


TOKENS = torch.randint(0, 100, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "places", [(), ("stream",), ("heads",), ("down",), ("order",), ("stream", "heads", "down", "order")]
)
@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_logits_stay_in_float64(checkpoint, float64_norms, kind, changes, places):
    folder = checkpoint(kind, **changes)
    expected = logits(open_model(folder), TOKENS)
    found = logits(open_model(folder, lambda shape: Rotated(shape, places)), TOKENS)
    assert expected.dtype == found.dtype == torch.float64
    assert (found - expected).abs().max() <= 1e-8 * expected.abs().max()


def test_logits_stay_in_float32_through_the_installed_norms(checkpoint):
    folder = checkpoint("qwen2")
    expected = logits(open_model(folder, dtype=torch.float32), TOKENS)
    found = logits(open_model(folder, Rotated, torch.float32), TOKENS)
    assert expected.dtype == torch.float32
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_materialised_model_is_the_streamed_one(checkpoint, kind, changes):
    folder = checkpoint(kind, **changes)
    streamed = logits(open_model(folder, Rotated, torch.float32), TOKENS)
    whole = open_model(folder, Rotated, torch.float32).materialise()
    assert whole.config.tie_word_embeddings is False
    assert whole.lm_head.weight.data_ptr() != whole.model.embed_tokens.weight.data_ptr()
    with torch.no_grad():
        assert torch.equal(whole(TOKENS).logits, streamed)


def test_a_tied_model_is_untied_and_its_head_folds_the_final_norm_alone(checkpoint):
    folder = checkpoint("llama", tie_word_embeddings=True)
    plain = open_model(folder).materialise()
    whole = open_model(folder, lambda shape: Rotated(shape, ())).materialise()
    assert torch.equal(whole.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    assert torch.equal(whole.lm_head.weight, plain.model.embed_tokens.weight * plain.model.norm.weight)
    assert torch.equal(whole.model.norm.weight, torch.ones_like(plain.model.norm.weight))


def test_overlay_comes_after_the_basis_and_the_installation(checkpoint):
    seen = []

    def overlay(index, block):
        seen.append((index, type(block.mlp.down_proj).__name__, block.input_layernorm.weight.unique().tolist()))
        block.mlp.down_proj.weight.mul_(0)

    model = open_model(checkpoint(), Rotated)
    with model.block(1, overlay) as block:
        assert seen == [(1, "QuantizedLinear", [1.0])]
        assert type(block.mlp.down_proj).__name__ == "QuantizedLinear"
        assert not block.mlp.down_proj.weight.any()
    with model.block(1) as block:
        assert block.mlp.down_proj.weight.any(), "an overlay must not outlive its block"
    assert all(p.is_meta for p in block.parameters())


def test_products_are_float64_and_rounded_once(checkpoint):
    folder = checkpoint("qwen2")
    exact, rounded = open_model(folder, Rotated), open_model(folder, Rotated, torch.bfloat16)
    with exact.block(0) as block, rounded.block(0) as low:
        for (name, weight), (_, stored) in zip(block.named_parameters(), low.named_parameters(), strict=True):
            assert torch.equal(weight.to(torch.bfloat16), stored), name


def test_folding_cancels_outlier_channels_exactly(checkpoint):
    folder = checkpoint()

    def edit(tensors, index):
        return rescale_block(tensors, 48, [3, 7], 32.0)

    plain, edited = open_model(folder), open_model(folder, edit=edit)
    assert not torch.equal(plain.tensors(0)["input_layernorm.weight"], edited.tensors(0)["input_layernorm.weight"])
    assert torch.equal(
        edited.reopened(None).tensors(0)["input_layernorm.weight"], edited.tensors(0)["input_layernorm.weight"]
    )
    before, after = fuse.fold_norms(plain.tensors(0)), fuse.fold_norms(edited.tensors(0))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_inputs_are_not_modified(checkpoint):
    model = open_model(checkpoint("qwen2"))
    tensors = model.tensors(0)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    Rotated(model.architecture).block(tensors, 0)
    assert all(torch.equal(tensors[name], copies[name]) for name in copies)


@pytest.mark.parametrize("n_high", [0, 1, 5, 16])
def test_two_parts_move_the_high_channels_of_every_head_to_the_end(n_high):
    order = fuse.part_order(3, (16 - n_high, n_high)).tolist()
    assert order == sorted(range(48), key=lambda channel: (channel % 16 >= 16 - n_high, channel))


def test_three_parts_of_two_heads():
    assert fuse.part_order(2, (1, 2, 1)).tolist() == [0, 4, 1, 2, 5, 6, 3, 7]


def test_centred_embedding_rows_have_mean_zero():
    rows = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    centred = fuse.rotate_embedding({"weight": rows}, None, center=True)["weight"]
    assert centred.mean(1).abs().max() < 1e-15
    assert (centred - rows).std(1, unbiased=False).max() < 1e-7
