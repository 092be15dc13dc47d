"""Block-wise loading and the staged block executor against the installed whole-model forward."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from ptqbench.errors import NumericalError
from ptqbench.models.architecture import from_config
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.source import ModelSource
from ptqbench.models.stages import STAGES, finish, forward, staged

VARIANTS = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 2}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 8}),
    ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
]


def open_model(folder, dtype=torch.float32):
    return BlockwiseModel(ModelSource(folder), dtype, torch.device("cpu"))


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_block_by_block_equals_the_installed_forward_exactly(checkpoint, kind, changes):
    folder = checkpoint(kind, **changes)
    tokens = torch.randint(0, 100, (3, 40), generator=torch.Generator().manual_seed(1))
    whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    model = open_model(folder)
    with torch.no_grad():
        expected = whole(tokens).logits
        hidden, positions = model.embed(tokens), model.positions(tokens.shape[1])
        for index in range(model.n_blocks):
            with model.block(index) as block:
                hidden = forward(block, hidden, positions)
        with model.head() as head:
            assert torch.equal(head(hidden), expected)


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_staged_block_equals_the_block_and_announces_true_inputs(checkpoint, kind, changes):
    model = open_model(checkpoint(kind, **changes))
    hidden = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(2))
    positions = model.positions(9)
    with torch.no_grad(), model.block(1) as block:
        seen = {}
        hooks = [
            block.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: seen.__setitem__(name, args[0].clone())
            )
            for stage in STAGES
            for name in stage.linears
        ]
        expected = forward(block, hidden, positions)
        for hook in hooks:
            hook.remove()
        modules = dict(block.named_modules())
        run = staged(block, hidden, positions)
        for stage in STAGES:
            inputs = next(run).inputs
            for name in stage.linears:
                assert torch.equal(inputs, seen[name])
        assert torch.equal(finish(run), expected)
        assert dict(block.named_modules()) == modules, "swapped modules were not put back"


def test_each_linear_runs_once_and_weights_changed_between_stages_are_used(checkpoint):
    model = open_model(checkpoint("qwen2"))
    hidden, positions = torch.randn(1, 7, 48), model.positions(7)
    with torch.no_grad(), model.block(0) as block:
        calls = []
        for stage in STAGES:
            for name in stage.linears:
                block.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
        run = staged(block, hidden, positions)
        for stage in STAGES:
            next(run)
            for name in stage.linears:
                block.get_submodule(name).weight.mul_(0.5)
        output = finish(run)
        assert sorted(calls) == sorted(name for stage in STAGES for name in stage.linears)
        assert torch.equal(output, forward(block, hidden, positions))


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_architecture_predicts_every_tensor(checkpoint, kind, changes):
    folder = checkpoint(kind, **changes)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    assert from_config(ModelSource(folder).config).tensor_shapes() == {
        n: tuple(p.shape) for n, p in whole.named_parameters()
    }


def test_parts_leave_memory(checkpoint):
    model = open_model(checkpoint())
    with model.block(0) as block:
        assert all(p.device.type == "cpu" for p in block.parameters())
    assert all(p.device.type == "meta" for p in block.parameters())


def test_materialised_model_equals_from_pretrained(checkpoint):
    folder = checkpoint("qwen3", tie_word_embeddings=True)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits
        assert torch.equal(open_model(folder).materialise()(tokens).logits, expected)


def test_sharded_checkpoint_is_read_through_its_index(checkpoint, tmp_path):
    folder = checkpoint("qwen2")
    whole = AutoModelForCausalLM.from_pretrained(folder)
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(ModelSource(tmp_path / "sharded").weight_files) > 2
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(open_model(tmp_path / "sharded").materialise()(tokens).logits, whole.eval()(tokens).logits)


def test_nan_in_a_weight_names_the_tensor(checkpoint):
    from safetensors.torch import load_file, save_file

    folder = checkpoint()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = open_model(folder)
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"), model.block(1):
        pass


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"]
)
def test_weight_beyond_the_range_of_float16_is_refused(checkpoint, name):
    from safetensors.torch import load_file, save_file

    folder = checkpoint()
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] = 7e4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"7e\+04 does not fit float16.*model.dtype=bfloat16"):
        open_model(folder, torch.float16).materialise()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_replicate_moves_embedded_tokens_by_one_unit_in_the_last_place_or_two(checkpoint, dtype):
    source, tokens = ModelSource(checkpoint("llama")), torch.arange(40).reshape(2, 20)
    plain = BlockwiseModel(source, dtype, torch.device("cpu"))
    first, again, second = (BlockwiseModel(source, dtype, torch.device("cpu"), replicate=n) for n in (1, 1, 2))
    embedded, moved = plain.embed(tokens), first.embed(tokens)
    integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}[dtype]
    normal = embedded.abs() >= torch.finfo(dtype).tiny * 1e3
    steps = (moved.view(integers).int() - embedded.view(integers).int())[normal].abs()
    assert steps.min() == 1
    assert steps.max() == 2
    assert torch.equal(again.embed(tokens), moved)
    assert not torch.equal(second.embed(tokens), moved)
    assert torch.equal(first.reopened(None).embed(tokens), moved)
    assert torch.equal(first.measured().embed(tokens), embedded)
