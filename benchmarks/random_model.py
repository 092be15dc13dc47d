"""Random checkpoints of a given shape, written shard by shard, for benchmarks that need the cost of a model and not its words."""

from __future__ import annotations

import dataclasses
import json
import random
import string
from pathlib import Path

from ptqbench.models.architecture import Architecture, published

SMALL = {
    "llama-1024": Architecture(1024, 68, 16, 8, 64, 2816, 4096, True, False, False),
    "qwen2-256": Architecture(256, 4, 4, 2, 64, 768, 4096, True, True, False),
    "qwen2-1024": Architecture(1024, 2, 16, 4, 64, 2816, 4096, True, True, False),
}
"""Shapes for a CPU, in the architecture of Qwen2."""


def shape(name: str, blocks: int | None = None) -> Architecture:
    """Return a small shape or that of a published model, perhaps cut to its first blocks."""
    known = SMALL | published()
    if name not in known:
        raise SystemExit(f"--shape {name}: expected one of {', '.join(known)}")
    return dataclasses.replace(known[name], n_blocks=min(blocks or 10**6, known[name].n_blocks))


def write(folder: Path, model: Architecture, dtype: str = "float32", seed: int = 0) -> Path:
    """Write a checkpoint with weights from N(0, 0.02^2), unit gains, and a tokenizer of two-letter words.

    Args:
        folder: Made if it does not exist.
        model: The shape.
        dtype: ``float32`` or ``bfloat16``.
        seed: Of the weights.

    Returns:
        ``folder``.
    """
    import torch
    from safetensors.torch import save_file

    kind = "qwen3" if model.qk_norm else "qwen2" if model.qkv_bias else "llama"
    config = {
        "model_type": kind, "architectures": [f"{kind.capitalize()}ForCausalLM"], "dtype": dtype, "hidden_act": "silu",
        "hidden_size": model.hidden_size, "num_hidden_layers": model.n_blocks, "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads, "head_dim": model.head_dim, "intermediate_size": model.intermediate_size,
        "vocab_size": model.vocab_size, "tie_word_embeddings": model.tied_embeddings, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(folder, model.vocab_size)
    files: dict[str, list[str]] = {}
    shapes = model.tensor_shapes()
    for name in shapes:
        files.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    generator, weight_map = torch.Generator().manual_seed(seed), {}
    for part, names in files.items():
        tensors = {}
        for name in names:
            gain = "norm" in name
            drawn = torch.ones(shapes[name]) if gain else torch.randn(shapes[name], generator=generator).mul_(0.02)
            tensors[name] = drawn.to(getattr(torch, dtype))
        save_file(tensors, folder / f"model-{part}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, f"model-{part}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _words(size: int) -> list[str]:
    """The words of the tokenizer, of two letters or digits each: as many as fit twice beside bytes and special tokens."""
    characters = string.ascii_letters + string.digits
    return [a + b for a in characters for b in characters][: (size - 256 - 16) // 2]


def _write_tokenizer(folder: Path, size: int) -> None:
    """Write a byte-level BPE in which every word, with its blank, is one token (what Qwen2's tokenizer class can read)."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words, blank = _words(size), "\u0120"
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *words, *(blank + word for word in words)]
    merges = [(word[0], word[1]) for word in words] + [(blank, word) for word in words]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))


def write_text(path: Path, model: Architecture, n_tokens: int, seed: int = 0) -> Path:
    """Write a document of random words of the tokenizer, a token each; returns ``path``."""
    words, draw = _words(model.vocab_size), random.Random(seed)
    path.write_text("".join(f" {draw.choice(words)}" for _ in range(n_tokens)))
    return path
