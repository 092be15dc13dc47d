"""An accepted checkpoint gives the model that transformers loads. Every other checkpoint is refused in one line that names it."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from reference_models import verify
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from ptqbench.cell.spec import ModelSpec
from ptqbench.errors import ConfigError, UnsupportedError
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.config import ACTIVATIONS
from ptqbench.models.source import ModelSource, digest, locate
from ptqbench.models.stages import forward

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


def edit_config(folder, drop=(), **values):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in drop} | values
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def configured(drop=(), **values):
    return lambda folder: edit_config(folder, drop, **values)


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    save_file({k: v.contiguous() for k, v in (change(tensors) or tensors).items()}, folder / WEIGHTS, {"format": "pt"})


def stored(change):
    return lambda folder: edit_tensors(folder, change)


def sharded(folder, **index):
    """Split the weights by name into two files, with an index."""
    tensors = load_file(folder / WEIGHTS)
    parts = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
    (folder / WEIGHTS).unlink()
    places = {name: file for file, names in parts.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places} | index))


def wrong_shards(folder):
    """An index that names the wrong shard for every tensor; transformers reads the headers of the files."""
    sharded(folder)
    index = json.loads((folder / INDEX).read_text())
    other = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}
    index["weight_map"] = {name: other[file] for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


def in_both_shards(folder):
    sharded(folder)
    held = load_file(folder / "b.safetensors")
    save_file(held | {"model.norm.weight": torch.full((48,), 3.0)}, folder / "b.safetensors", {"format": "pt"})


def stale_index(folder):
    other = {name: 0.5 * value for name, value in load_file(folder / WEIGHTS).items()}
    save_file(other, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "model-00001-of-00001.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))


def linked(folder):
    """Every file a link to a file elsewhere, as in the cache of the hub."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)


def in_folders(folder):
    """Shards of one name in two folders."""
    sharded(folder)
    for part in "ab":
        (folder / part).mkdir()
        (folder / f"{part}.safetensors").rename(folder / part / "shard.safetensors")
    index = (folder / INDEX).read_text()
    (folder / INDEX).write_text(re.sub(r"([ab])\.safetensors", r"\1/shard.safetensors", index))


def head_of_its_own(tensors):
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].flip(0)}


def head_of_the_embedding(tensors):
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def typed(change, drop=(), **values):
    """Change the stored types and what the configuration says about them."""
    return lambda folder: (edit_config(folder, drop, **values), edit_tensors(folder, change))


def biases(tensors):
    return tensors | {
        k.replace("weight", "bias"): torch.ones(len(v)) for k, v in tensors.items() if k.endswith("proj.weight")
    }


def head_norms(tensors):
    return tensors | {
        f"model.layers.{i}.self_attn.{n}_norm.weight": torch.full((16,), 2.0) for i in (0, 1) for n in "qk"
    }


def mixed_types(tensors):
    types = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    return {name: value.to(types[i % 4]) for i, (name, value) in enumerate(sorted(tensors.items()))}


def as_type(dtype):
    return lambda tensors: {name: value.to(dtype) for name, value in tensors.items()}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG = {"rope_type": "longrope", "short_factor": [1.0 + i / 4 for i in range(8)], "long_factor": [2.0 + i for i in range(8)],
        "factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip


def rope(key="rope_parameters", theta=None, **values):
    """Give the rotary embedding in the form of transformers 5 (theta inside) or in the older one (theta beside)."""
    values = values if theta is None else {**values, "rope_theta": theta}
    return configured(("rope_parameters",), **{key: values}, **({} if theta else {"rope_theta": 500.0}))


def windows(width, first, **values):
    """Ask for sliding windows by the keys that Qwen had before ``layer_types``."""
    return configured(
        ("layer_types",), use_sliding_window=True, sliding_window=width, max_window_layers=first, **values
    )


def rope_parts_outside(folder):
    """The old form of Phi-3: the original context beside the mapping."""
    inside = {key: value for key, value in LONG.items() if key != "original_max_position_embeddings"}
    edit_config(
        folder, ("rope_parameters",), rope_scaling=inside, original_max_position_embeddings=16, rope_theta=300.0
    )


WINDOW = {"use_sliding_window": True, "sliding_window": 4}
OLD_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
ACCEPTED = {
    "untied": ("llama", {}, None),
    "tied": ("llama", {"tie_word_embeddings": True}, None),
    "no tie_word_embeddings": ("qwen2", {}, configured(("tie_word_embeddings",))),
    "tied, another head": ("llama", {"tie_word_embeddings": True}, stored(head_of_its_own)),
    "tied, equal head": ("qwen3", {"tie_word_embeddings": True}, stored(head_of_the_embedding)),
    "all biases": ("llama", {"attention_bias": True, "mlp_bias": True}, None),
    "biases of qwen3": ("qwen3", {"attention_bias": True}, None),
    "extra biases": ("llama", {}, stored(biases)),
    "extra norms": ("llama", {}, stored(head_norms)),
    "extra blocks": ("llama", {"num_hidden_layers": 4}, configured(num_hidden_layers=2)),
    "old buffers": ("llama", {}, stored(lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})),
    "null kv heads": ("llama", {"num_key_value_heads": 4}, configured(num_key_value_heads=None)),
    "no kv heads": ("llama", {"num_key_value_heads": 4}, configured(("num_key_value_heads",))),
    "no head_dim": ("llama", {"head_dim": 12}, configured(("head_dim",))),
    "gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}, None),
    "shards": ("llama", {}, sharded),
    "wrong shards": ("qwen2", {}, wrong_shards),
    "in both shards": ("qwen2", {}, in_both_shards),
    "stale index": ("llama", {}, stale_index),
    "bfloat16": ("llama", {}, typed(as_type(torch.bfloat16), dtype="bfloat16")),
    "float16": ("qwen3", {}, typed(as_type(torch.float16), ("dtype",), torch_dtype="float16")),
    "float64 in float32": ("llama", {}, stored(as_type(torch.float64))),
    "mixed types": ("llama", {}, stored(mixed_types)),
    "mixed types, none in config": ("llama", {}, typed(mixed_types, ("dtype",))),
    "bfloat16, none in config": ("llama", {}, typed(as_type(torch.bfloat16), ("dtype",))),
    "type in index": ("llama", {}, lambda f: (edit_config(f, ("dtype",)), sharded(f, metadata={"dtype": "float16"}))),
    "full attention": ("qwen3", {}, configured(layer_types=["full_attention"] * 2, use_sliding_window=True, sliding_window=4)),
    "windows in some blocks": ("qwen3", {}, configured(layer_types=["full_attention", "sliding_attention"], **WINDOW)),
    "windows by the old keys": ("qwen2", {}, windows(4, 1)),
    "windows in every block": ("qwen3", {}, windows(5, 0)),
    "windows longer than the text": ("qwen2", {}, windows(64, 1)),
    "windows in no block": ("qwen2", {}, windows(4, 2)),
    "windows without width": ("qwen2", {}, windows(None, 0)),
    "windows of llama": ("llama", {}, configured(use_sliding_window=True, sliding_window=4)),
    "rope default": ("llama", {}, rope(rope_type="default", theta=1234.0)),
    "rope old, null": ("llama", {}, configured(("rope_parameters",), rope_scaling=None, rope_theta=777.0)),
    "rope old linear": ("llama", {}, rope("rope_scaling", type="linear", factor=2.0)),
    "rope linear": ("qwen2", {}, rope(rope_type="linear", factor=4, theta=100.0)),
    "rope dynamic": ("llama", {"max_position_embeddings": 16}, rope(rope_type="dynamic", factor=4.0, theta=1e4)),
    "rope llama3": ("llama", {}, rope(**LLAMA3, theta=1e4)),
    "rope old llama3": ("llama", {}, rope("rope_scaling", **LLAMA3)),
    "rope yarn": ("qwen3", {}, rope(**YARN, theta=1e4)),
    "rope old yarn": ("qwen2", {}, rope("rope_scaling", **OLD_YARN)),
    "rope longrope": ("llama", {}, rope(**LONG, theta=1e4)),
    "rope both forms": ("llama", {}, configured(rope_scaling={"rope_type": "linear", "factor": 3.0}, rope_theta=300.0)),
    "rope parts outside": ("llama", {}, rope_parts_outside),
    "rope theta twice": ("llama", {}, configured(rope_parameters={"rope_type": "default", "rope_theta": 50.0}, rope_theta=9e3)),
    "no head_dim in qwen3": ("qwen3", {"head_dim": 128}, configured(("head_dim",))),
    "head_dim in qwen2": ("qwen2", {}, configured(head_dim=12)),
    "links": ("llama", {}, linked),
    "shards in folders": ("llama", {}, in_folders),
    "no format in header": ("llama", {}, lambda f: save_file(load_file(f / WEIGHTS), f / WEIGHTS)),
    "other architecture named": ("llama", {}, configured(architectures=["MistralForCausalLM"], auto_map={"AutoConfig": "a.B"})),
    "keys of other models": ("llama", {}, configured(embedding_multiplier=12.0, final_logit_softcapping=1.0, rotary_pct=0.5)),
    "not in ASCII": ("llama", {}, configured(finetuned_by="Zoë — 模型")),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_checkpoints_are_what_transformers_loads(checkpoint, name):
    kind, changes, change = ACCEPTED[name]
    folder = checkpoint(kind, **changes)
    if change:
        change(folder)
    spec = ModelSpec(name="local", path=str(folder))
    spec = dataclasses.replace(spec, digest=digest(spec))
    verify(spec)
    source = locate(spec)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="sdpa").eval()
    assert source.dtype == str(whole.dtype).removeprefix("torch.")
    model = BlockwiseModel(source, whole.dtype, torch.device("cpu"))
    tokens = torch.randint(0, 100, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden, positions = model.embed(tokens), model.positions(24)
        for index in range(model.n_blocks):
            with model.block(index) as block:
                hidden = forward(block, hidden, positions)
        with model.head() as head:
            assert torch.equal(head(hidden), whole(tokens).logits.float())
        loaded = model.materialise()
        assert torch.equal(loaded(tokens).logits, whole(tokens).logits)
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


def test_a_model_writes_as_generation_config_says(checkpoint):
    folder = checkpoint()
    tokens = torch.arange(8)[None]

    def written(model):
        return model.generate(tokens, max_new_tokens=12, do_sample=False).tolist()

    plain = written(AutoModelForCausalLM.from_pretrained(folder))
    (folder / "generation_config.json").write_text(
        json.dumps({"repetition_penalty": 9.0, "eos_token_id": plain[0][10]})
    )
    expected = written(AutoModelForCausalLM.from_pretrained(folder))
    assert expected != plain, "the test shows nothing"
    loaded = BlockwiseModel(ModelSource(folder), torch.float32, torch.device("cpu")).materialise()
    assert written(loaded) == expected


def test_generation_config_is_part_of_the_identity_where_the_model_writes(checkpoint):
    from ptqbench.cell.fingerprint import run_id
    from ptqbench.sweeps.compose import compose_cell
    from ptqbench.sweeps.pins import check_unchanged

    folder = checkpoint(max_position_embeddings=512)  # more than the 256 tokens that GSM8K lets a model write
    path = folder / "generation_config.json"
    words = ["+method=fp16", "bitwidth=fp16", "model=local", f"model.path={folder}", "evaluation=tiny",
             "evaluation.texts.tiny.seq_len=64"]  # fmt: skip
    writing = [*words, "evaluation.tasks=['gsm8k/exact_match:strict-match']"]

    def ids():
        return [run_id(compose_cell(given)) for given in (words, writing)]

    path.unlink(missing_ok=True)
    without = ids()
    path.write_text('{"repetition_penalty": 1.1}')
    assert ids()[0] == without[0]
    assert ids()[1] != without[1]
    spec = compose_cell(writing)
    check_unchanged(spec)
    path.write_text('{"repetition_penalty": 1.2}')
    without_digest = dataclasses.replace(spec, evaluation=dataclasses.replace(spec.evaluation, generation_digest=None))
    for changed in (spec, without_digest):
        with pytest.raises(ConfigError, match=r"generation_config\.json of model .* has changed"):
            check_unchanged(changed)


REMARKS = {
    "tied, another head": "tie_word_embeddings, but lm_head.weight is stored and is used",
    "extra biases": "model.layers.0-1.mlp.down_proj.bias, .* and 3 more",
    "extra norms": "model.layers.0-1.self_attn.k_norm.weight, model.layers.0-1.self_attn.q_norm.weight",
    "extra blocks": "model.layers.2-3.input_layernorm.weight",
}


@pytest.mark.parametrize("name", [*REMARKS, "old buffers", "tied"])
def test_what_is_left_out_is_said_and_recorded(checkpoint, caplog, name):
    kind, changes, change = ACCEPTED[name]
    folder = checkpoint(kind, **changes)
    if change:
        change(folder)
    digest(ModelSpec(name="local", path=str(folder)))
    remarks = ModelSource(folder).remarks
    assert caplog.messages == [f"{folder}: {remark}" for remark in remarks]
    if name in REMARKS:
        (remark,) = remarks
        assert re.search(REMARKS[name], remark)
    else:
        assert not remarks


def one_tensor(change, name=UP):
    return stored(lambda t: t.update({name: change(t[name])}))


def scales(suffix, dtype=None):
    def change(tensors):
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            tensors[name.removesuffix(".weight") + suffix] = torch.ones(1)
            if dtype is not None:
                tensors[name] = tensors[name].to(dtype)

    return stored(change)


def indexed(weight_map):
    def change(folder):
        (folder / WEIGHTS).rename(folder / "a.safetensors")
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return change


def outside(folder):
    sharded(folder)
    (folder / "b.safetensors").rename(folder.parent / "b.safetensors")
    index = (folder / INDEX).read_text().replace('"b.safe', '"../b.safe')
    (folder / INDEX).write_text(index)


def written(name, content, *removed):
    def change(folder):
        (folder / name).write_bytes(content)
        for other in removed:
            (folder / other).unlink()

    return change


def cut(folder):
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-9])


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"

REFUSED = {
    # stored types, and what a quantized checkpoint leaves behind
    "int8": (one_tensor(lambda w: w.to(torch.int8)), "dtype I8.*original checkpoint in 16"),
    "uint8": (one_tensor(lambda w: w.to(torch.uint8)), "dtype U8"),
    "bool": (one_tensor(lambda w: w > 0), "dtype BOOL"),
    "int64": (one_tensor(lambda w: w.to(torch.int64), "model.norm.weight"), "model.norm.weight.*dtype I64"),
    "complex": (one_tensor(lambda w: w.to(torch.complex64)), "dtype C64"),
    "float8": (one_tensor(lambda w: w.to(torch.float8_e5m2)), "dtype F8_E5M2"),
    "float8 and scales": (scales(".weight_scale_inv", torch.float8_e4m3fn), "dtype F8_E4M3 with .*weight_scale_inv"),
    "scales alone": (scales(".weight_scale"), "quantized already.*weight_scale"),
    "packed": (stored(lambda t: {k.replace("proj.weight", "proj.qweight"): v for k, v in t.items()}), "qweight"),
    "quantization_config": (configured(quantization_config={"quant_method": "gptq"}), "quantized.*quantization_config.*gptq"),
    "empty quantization_config": (configured(quantization_config={}), "quantized"),
    "compression_config": (configured(compression_config={"format": "pack-quantized"}), "compression_config.*pack-quantized"),
    # adapters
    "adapter": (written("adapter_config.json", b"{}"), "adapter_config.json.*merge_and_unload"),
    "adapter alone": (written("adapter_config.json", b"{}", "config.json", WEIGHTS), "adapter"),
    "adapter not merged": (stored(lambda t: t | {"model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 48)}), "lora_A.*merge"),
    # tensors that are not those of the configuration
    "no head": (stored(lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"}), "lack tensor 'lm_head.weight'.*tie_word"),
    "no block": (configured(num_hidden_layers=3), r"lack tensor 'model\.layers\.2"),
    "no biases": (configured(attention_bias=True), r"lack tensor 'model\.layers\.0\.self_attn\.q_proj\.bias'"),
    "twice by prefix": (stored(lambda t: t | {"norm.weight": 2 * t["model.norm.weight"]}), "must be stored once"),
    "twice by two prefixes": (stored(lambda t: t | {f"model.{UP}": 2 * t[UP]}), "model.model.*must be stored once"),
    "head with prefix": (stored(lambda t: t | {"model.lm_head.weight": 2 * t["lm_head.weight"]}), r"as 'lm_head\.weight'"),
    "no prefix": (stored(lambda t: {k.removeprefix("model."): v for k, v in t.items()}), "lack.*prefix 'model.'"),
    "wrong shape": (configured(intermediate_size=80), "gate_proj.*config.json says"),
    "larger vocabulary": (configured(vocab_size=9999), "embed_tokens.*config.json says"),
    # configuration
    "no blocks": (configured(num_hidden_layers=0), "num_hidden_layers must be a positive integer, got 0"),
    "minus one block": (configured(num_hidden_layers=-1), "num_hidden_layers must be a positive integer, got -1"),
    "width as text": (configured(hidden_size="48"), "hidden_size must be a positive integer, got '48'"),
    "width as float": (configured(hidden_size=48.0), "hidden_size"),
    "heads as bool": (configured(num_attention_heads=True), "num_attention_heads"),
    "width missing": (configured(("hidden_size",)), "no 'hidden_size'"),
    "no kv heads": (configured(num_key_value_heads=0), "num_key_value_heads must be a positive integer, got 0"),
    "kv heads do not divide": (configured(num_key_value_heads=3), "do not divide"),
    "head_dim 0": (configured(head_dim=0), "head_dim must be a positive integer, got 0"),
    "odd head_dim": (configured(head_dim=15), "head_dim must be even"),
    "tie as number": (configured(tie_word_embeddings=1), "tie_word_embeddings must be true or false"),
    "activation": (configured(hidden_act="swoosh"), "hidden_act 'swoosh'.*silu"),
    "activation as list": (configured(hidden_act=["silu"]), "hidden_act"),
    "epsilon as text": (configured(rms_norm_eps="1e-5"), "rms_norm_eps"),
    "dtype as number": (configured(dtype=16), "dtype must be the name"),
    "dtype with prefix": (configured(dtype="torch.bfloat16"), "dtype must be the name"),
    "padding outside": (configured(pad_token_id=10**6), "pad_token_id"),
    "context 0": (configured(max_position_embeddings=0), "max_position_embeddings"),
    "model_type as list": (configured(model_type=["llama"]), r"model_type \['llama'\]"),
    "model_type": (configured(model_type="gpt2"), "'gpt2'.*known: llama"),
    "per_layer_config": (configured(per_layer_config={"0": {"num_key_value_heads": 1}}), "per_layer_config"),
    "transformers_weights": (configured(transformers_weights="other.safetensors"), "transformers_weights"),
    "configuration_files": (configured(configuration_files=["config.4.0.0.json"]), "names another configuration file"),
    "bidirectional": (configured(is_causal=False), "is_causal must be true, got False"),
    "tuples": (configured(return_dict=False), "return_dict must be true"),
    "encoder and decoder": (configured(is_encoder_decoder=True), "is_encoder_decoder must be false"),
    "attentions": (configured(output_attentions=True), "output_attentions must be false"),
    "end token as text": (configured(eos_token_id="</s>"), "eos_token_id must be an integer"),
    "cache as text": (configured(use_cache="yes"), "use_cache must be true or false"),
    "sliding": (configured(layer_types=["full_attention", "sliding_attention"], sliding_window=4), "'sliding_attention'"),
    "chunked": (configured(layer_types=["chunked_attention"] * 2), "'chunked_attention'"),
    "too many layer types": (configured(layer_types=["full_attention"] * 3), "one entry for each of 2 blocks"),
    "layer types as text": (configured(layer_types="full_attention"), "layer_types must be a list"),
    "sliding without leave": (
        configured(layer_types=["sliding_attention"] * 2, model_type="qwen2"), "use_sliding_window is not true",
    ),
    "window as text": (windows("4", 1, model_type="qwen2"), "sliding_window must be a positive integer, got '4'"),
    "first window as text": (windows(4, "1", model_type="qwen2"), "max_window_layers must be an integer"),
    "rope unknown": (rope(rope_type="spiral", factor=2.0), "rope_type 'spiral'.*known: default"),
    "rope unknown, old": (rope("rope_scaling", type="mrope", mrope_section=[2, 3, 3]), "'mrope'"),
    "rope as list": (configured(rope_parameters=[1]), "rope_parameters must be a mapping"),
    "rope without factor": (rope(rope_type="linear"), "no 'factor'"),
    "rope factor as text": (rope(rope_type="linear", factor="2"), "factor must be a positive number, got '2'"),
    "rope factor 0": (rope(rope_type="dynamic", factor=0), "factor must be a positive number, got 0"),
    "rope theta": (rope(rope_type="default", theta="1e4"), "rope_theta must be a positive number"),
    "rope llama3 incomplete": (rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0), "no 'high_freq_factor'"),
    "rope llama3 degenerate": (rope(**(LLAMA3 | {"low_freq_factor": 4.0})), "must differ"),
    "rope longrope": (rope(**(LONG | {"long_factor": [1.0]})), "long_factor must be a list of 8"),
    "rope partial": (configured(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "rope by layer type": (configured(rope_parameters={"full_attention": {"rope_type": "default"}}), "differs between kinds"),
    "config as list": (written("config.json", b"[1]"), "expected a JSON object, got list"),
    "config nested": (written("config.json", b"[" * 100_000), "not valid JSON"),
    "config in latin-1": (written("config.json", '{"model_type": "é"}'.encode("latin-1")), "not valid JSON"),
    # files
    "index of nothing": (indexed({}), "not a valid safetensors index"),
    "index as list": (indexed(["a.safetensors"]), "not a valid safetensors index"),
    "index of numbers": (indexed({"a": 1}), "not a valid safetensors index"),
    "index without metadata": (lambda f: sharded(f, metadata=None), "metadata"),
    "index of the whole disk": (indexed({"a": "/etc/passwd"}), "outside the folder"),
    "index outside": (outside, "outside the folder"),
    "shard missing": (indexed({"a": "b.safetensors"}), "names b.safetensors.*incomplete"),
    "shard lacks a tensor": (
        lambda f: (sharded(f), save_file({}, f / "b.safetensors", {"format": "pt"})), "lack tensor",
    ),
    "distributed": (written("shard-00001-model-00001-of-00002.safetensors", b""), "distributed checkpoint"),
    "PyTorch": (written("pytorch_model.bin", b"", WEIGHTS), "got pytorch_model.bin.*save_pretrained"),
    "GGUF": (written("model-q4.gguf", b"", WEIGHTS), "got model-q4.gguf"),
    "variant": (lambda f: (f / WEIGHTS).rename(f / "model.fp16.safetensors"), "got model.fp16.safetensors"),
    "pointer for weights": (written(WEIGHTS, POINTER), "git lfs pull"),
    "pointer for config": (written("config.json", POINTER), "git lfs pull"),
    "pointer for tokenizer": (written("tokenizer.json", POINTER), "git lfs pull"),
    "sentencepiece alone": (written("tokenizer.model", b"\n\x0e", "tokenizer.json"), "pip install sentencepiece"),
    "tiktoken alone": (written("tokenizer.model", b"IQ== 0\n", "tokenizer.json"), "pip install tiktoken"),
    "cut tokenizer": (cut, "tokenizer.json is damaged"),
    "empty tokenizer": (written("tokenizer.json", b"{}"), "tokenizer.json is damaged"),
    "damaged settings": (written("tokenizer_config.json", b"{"), "tokenizer_config.json is not valid JSON"),
    "settings as list": (written("special_tokens_map.json", b"[]"), "special_tokens_map.json: expected a JSON object"),
    "no merges": (written("vocab.json", b"{}", "tokenizer.json"), "merges.txt"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_everything_else_is_refused_by_name_in_one_line(checkpoint, name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    folder = checkpoint()
    change, words = REFUSED[name]
    change(folder)
    with pytest.raises((ConfigError, UnsupportedError), match=words) as refusal:
        digest(ModelSpec(name="local", path=str(folder)))
    assert str(folder) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "cannot fill 4 bytes"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "expected them to begin at 0"),
        ({key: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for key in "vw"}, "begin at 4"),
        ({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "corrupt"),
        ({"w": {"dtype": "F32", "shape": [1]}}, "corrupt"),
        ({"w": [1]}, "corrupt"),
        ([1], "corrupt"),
        ({"w": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, "corrupt"),
    ],
)  # fmt: skip
def test_damaged_headers_are_refused(checkpoint, header, words):
    folder, text = checkpoint(), json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8 if "4, 8" in str(header) else 4))
    with pytest.raises(ConfigError, match=words):
        ModelSource(folder).check_files()


def test_what_transformers_cannot_build_is_a_fault_of_the_configuration(checkpoint):
    folder = checkpoint()
    edit_config(folder, id2label={"first": "A"})
    with pytest.raises(ConfigError, match="transformers cannot build a model"):
        BlockwiseModel(ModelSource(folder), torch.float32, torch.device("cpu"))


def test_every_activation_is_one_of_transformers():
    assert set(ACTIVATIONS) <= set(ACT2FN)


def test_rotary_embedding_forgets_longer_windows(checkpoint):
    """A dynamic embedding of transformers stays stretched after a long window, which would change the tables of shorter ones."""
    folder = checkpoint(max_position_embeddings=16)
    rope(rope_type="dynamic", factor=4.0, theta=1e4)(folder)
    model = BlockwiseModel(ModelSource(folder), torch.float32, torch.device("cpu"))
    first = model.positions(20).rope[0]
    model.positions(64)
    assert torch.equal(model.positions(20).rope[0], first)


def test_hub_model_is_checked_as_far_as_it_is_here(checkpoint, tmp_path, monkeypatch):
    made, commit = checkpoint(), "1" * 40
    repository = tmp_path / "hub" / "models--some--model"
    here = repository / "snapshots" / commit
    shutil.copytree(made, here)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    spec = ModelSpec(name="some", hub_id="some/model")
    weights = (here / WEIGHTS).read_bytes()
    (here / WEIGHTS).unlink()
    spec = dataclasses.replace(spec, digest=digest(spec))
    with pytest.raises(ConfigError, match="has no weights"):
        verify(spec)
    (here / WEIGHTS).write_bytes(weights)
    verify(spec)
    one_tensor(lambda w: w.to(torch.int8))(here)
    with pytest.raises(UnsupportedError, match="dtype I8"):
        digest(spec)


def test_a_composed_cell_has_the_type_of_the_weights_where_the_configuration_has_none(checkpoint):
    from ptqbench.sweeps.compose import compose_cell

    folder = checkpoint()
    typed(as_type(torch.bfloat16), ("dtype",))(folder)
    words = [
        "+method=fp16",
        "bitwidth=fp16",
        "model=local",
        f"model.path={folder}",
        "evaluation=tiny",
        "evaluation.texts.tiny.seq_len=64",
    ]
    assert compose_cell(words).model.dtype == "bfloat16"


def test_the_result_of_a_cell_says_what_was_left_out(checkpoint, tmp_path):
    from ptqbench.run import run_cell
    from ptqbench.runs.folder import create
    from ptqbench.sweeps.compose import compose_cell

    folder = checkpoint()
    stored(biases)(folder)
    words = ["+method=fp16", "bitwidth=fp16", "model=local", f"model.path={folder}", "evaluation=tiny", "evaluation.tasks=[]",
             "evaluation.texts.tiny.seq_len=64", f"execution.runs_dir={tmp_path}"]  # fmt: skip
    spec = compose_cell(words)
    assert run_cell(spec, create(spec))["remarks"] == ModelSource(folder).remarks != []
