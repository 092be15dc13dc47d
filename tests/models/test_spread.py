"""A whole model on several devices: where its parts go, and that it computes what it computes on one."""

import functools

import accelerate
import pytest
import torch
from transformers import AutoTokenizer

from ptqbench.cell.spec import EvaluationSpec
from ptqbench.evaluate.zero_shot import Harness
from ptqbench.models import blockwise, spread
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.source import ModelSource

CUDA = torch.device("cuda")


def opened(folder):
    return BlockwiseModel(ModelSource(folder), torch.float32, torch.device("cpu"))


@pytest.fixture
def model(checkpoint):
    return opened(checkpoint("qwen3", num_hidden_layers=8, tie_word_embeddings=True))


def gpus(monkeypatch, *free):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free[index], free[index]))


def size(module):
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def test_consecutive_blocks_share_a_gpu_and_none_is_cut(model, monkeypatch):
    whole = size(model.skeleton)
    gpus(monkeypatch, *[int(0.55 * whole / spread.FREE_SHARE)] * 3)
    chosen = spread.places(model.skeleton, CUDA)
    blocks = [spread.place_of(f"model.layers.{index}", chosen) for index in range(8)]
    assert blocks == sorted(blocks)
    assert len(set(blocks)) > 1
    assert spread.place_of("lm_head", chosen) == spread.place_of("model.embed_tokens", chosen), (
        "tied weights stay together"
    )


def test_a_model_that_one_gpu_holds_is_not_spread(model, monkeypatch):
    gpus(monkeypatch, *[10 * size(model.skeleton)] * 2)
    assert spread.places(model.skeleton, CUDA) == {"": torch.device("cuda", 0)}
    gpus(monkeypatch, 1)
    assert spread.places(model.skeleton, CUDA) == {"": CUDA}
    assert spread.places(model.skeleton, torch.device("cpu")) == {"": torch.device("cpu")}


def test_too_few_gpus_are_one_line_that_counts_as_lack_of_memory(model, monkeypatch):
    from ptqbench.runs.failures import classify

    gpus(monkeypatch, *[size(model.skeleton) // 3] * 2)
    with pytest.raises(torch.OutOfMemoryError, match=r"free memory of 2 GPUs.*resources\.gpus") as refused:
        spread.places(model.skeleton, CUDA)
    assert classify(refused.value).name == "gpu_memory"


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_spread_model_computes_and_writes_what_it_does_on_one_device(kind, checkpoint, tmp_path, monkeypatch):
    """The second device is the disk: accelerate moves weights and states there as it does between GPUs."""
    folder = checkpoint(kind, num_hidden_layers=3)
    tokens = torch.arange(20)[None]
    expected = opened(folder).materialise()
    chosen = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    chosen |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    monkeypatch.setattr(blockwise, "places", lambda model, device: chosen)
    monkeypatch.setattr(
        spread, "dispatch_model", functools.partial(accelerate.dispatch_model, offload_dir=tmp_path / "disk")
    )
    found = opened(folder).materialise()
    assert {p.device.type for p in found.model.layers[1].parameters()} == {"meta"}
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, expected(tokens).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for model in (found, expected):
        assert Harness(model, tokenizer, EvaluationSpec("e"))._model.device == torch.device("cpu")
    written = [model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0) for model in (found, expected)]
    assert torch.equal(*written)
