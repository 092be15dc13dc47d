"""Small models in float64, matrices to rotate them with, and the shapes that the laws of live models are tested on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ptqbench.errors import ConfigError
from ptqbench.models.source import digest, locate
from ptqbench.numerics.orthogonal import generator, haar

F64 = torch.float64

VARIANTS = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 8}),
    ("qwen3", {"head_dim": 32, "num_attention_heads": 6, "num_key_value_heads": 3}),
]


def load(folder: Path, dtype: torch.dtype = F64, attention: str = "sdpa", unit_gain: bool = False) -> PreTrainedModel:
    """Load a model; in float64 its norms (which compute in float32 as installed) are replaced by exact ones."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if name.endswith("norm"):
            exact = nn.RMSNorm(len(module.weight), module.variance_epsilon, dtype=dtype)
            exact.weight = nn.Parameter(module.weight, requires_grad=False)
            if unit_gain and len(module.weight) == model.config.hidden_size:
                exact.weight.fill_(1)
            if dtype == F64:
                model.set_submodule(name, exact)
    return model


def random_tokens(batch: int, n_tokens: int, seed: int = 1) -> Tensor:
    """Draw (batch, n_tokens) token ids."""
    return torch.randint(1, 100, (batch, n_tokens), generator=torch.Generator().manual_seed(seed))


def run(model: PreTrainedModel, tokens: Tensor, **kwargs: object) -> Tensor:
    """Return the logits."""
    with torch.no_grad():
        return model(tokens, **kwargs).logits


def rotation_stack(model: PreTrainedModel, seed: int = 0) -> Tensor:
    """Draw one float64 (e, e) rotation for every key/value head."""
    attention = model.model.layers[0].self_attn
    draws = generator(seed, "rotation")
    return torch.stack([haar(attention.head_dim, draws) for _ in range(model.config.num_key_value_heads)])


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return ||actual - expected|| / ||expected||."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def verify(spec):
    """Check the model of a cell as ``sweeps.pins`` does when the cell starts."""
    locate(spec)
    if digest(spec) != spec.digest:
        raise ConfigError(f"the model has changed since the cell was composed: expected {spec.digest}")
