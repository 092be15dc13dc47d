"""Bases of transforms: the function of the model stays at 16 bits, whatever the architecture."""

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.smollm3.modeling_smollm3 import SmolLM3RMSNorm

from transforms_at_hand import TOKENS, TRANSFORMS, cell, in_basis, logits, member, open_model

BROAD = (
    "r2", "quarot", "full_shared", "one_per_decoder", "per_layer", "outlier", "learned", "smoothquant everywhere", "awq",
    "awq from moments",
)  # fmt: skip
FIXED = ("folding", "r2", "r3", "r4", "head mixing", "stream untouched", "awq")
"""Of families with norms behind attention and MLP, whose residual stream keeps its basis."""
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
VARIANTS = [
    ("llama", {}, BROAD),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1, "intermediate_size": 172}, BROAD),
    ("llama", {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 2, "attention_bias": True}, BROAD),
    ("qwen2", {"tie_word_embeddings": True}, tuple(TRANSFORMS)),
    ("qwen3", {"head_dim": 8}, BROAD),
    (
        "qwen3",
        {"head_dim": 32, "num_attention_heads": 12, "num_key_value_heads": 3, "tie_word_embeddings": True},
        BROAD,
    ),
    ("llama", {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8}, ("quarot",)),
    ("qwen2", {"hidden_size": 112, "num_attention_heads": 14, "num_key_value_heads": 2}, ("quarot",)),
    ("mistral", {"sliding_window": 5}, BROAD),
    ("smollm3", {"no_rope_layers": [1, 0], "attention_bias": True, **WINDOW}, BROAD),
    ("phi3", {"hidden_size": 64, **WINDOW, "num_key_value_heads": 1}, BROAD),
    (
        "gemma3_text",
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5},
        (*FIXED, "smoothquant everywhere"),
    ),
    ("gemma3_text", {"tie_word_embeddings": True, "final_logit_softcapping": 3.0, "attention_bias": True}, FIXED),
    ("olmo2", {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 1}, FIXED),
]


@pytest.fixture
def float64_norms(monkeypatch):
    """The installed norms compute in float32; laws to 1e-8 need the same formula in float64."""

    def exact(self, hidden):
        wide = hidden.double()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(hidden.dtype)

    def exact_from_one(self, hidden):
        return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)

    for cls in (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, MistralRMSNorm, SmolLM3RMSNorm, Phi3RMSNorm, Olmo2RMSNorm):
        monkeypatch.setattr(cls, "forward", exact)
    monkeypatch.setattr(Gemma3RMSNorm, "forward", exact_from_one)


@pytest.mark.parametrize(("kind", "changes", "labels"), VARIANTS)
def test_logits_stay_in_float64_with_quantizers_off(checkpoint, tmp_path, float64_norms, kind, changes, labels):
    model = open_model(checkpoint(kind, **changes))
    expected = logits(model)
    for label in labels:
        name, options = TRANSFORMS[label]
        rotated = in_basis(model, member(name, **options), cell(), tmp_path / label)
        error = (logits(rotated, quantizers=False) - expected).abs().max() / expected.abs().max()
        assert error <= 1e-8, f"{label}: {error}"


@pytest.mark.parametrize(("kind", "changes", "labels"), VARIANTS)
def test_logits_stay_in_float64_at_sixteen_bits(checkpoint, tmp_path, float64_norms, kind, changes, labels):
    model = open_model(checkpoint(kind, **changes))
    expected = logits(model)
    for label in {"quarot", "full_shared", "per_layer", "stream untouched", "smoothquant everywhere"} & {*labels}:
        name, options = TRANSFORMS[label]
        rotated = in_basis(model, member(name, **options), cell(16, 16, 16, 16), tmp_path / label)
        error = (logits(rotated) - expected).abs().max() / expected.abs().max()
        assert error <= 1e-8, f"{label}: {error}"


@pytest.mark.parametrize("label", ["quarot", "full_shared", "per_layer", "smoothquant everywhere", "awq"])
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
