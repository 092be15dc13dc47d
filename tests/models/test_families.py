"""Every family beside Llama and Qwen, on small random models with its traits, against the installed transformers class."""

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from ptqbench.cell.spec import ModelSpec
from ptqbench.engine.blocks_on_disk import BlockState
from ptqbench.errors import ConfigError, UnsupportedError
from ptqbench.evaluate.loglikelihood import log_likelihoods
from ptqbench.evaluate.perplexity import perplexity
from ptqbench.models.architecture import from_config
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.family import FAMILIES
from ptqbench.models.source import ModelSource, digest
from ptqbench.models.stages import behind, finish, forward, staged, stages_of
from ptqbench.run import run_cell
from ptqbench.runs.folder import create
from ptqbench.sweeps.compose import compose_cell

N_TOKENS = 24
"""Longer than the sliding windows of the models below."""
TOKENS = torch.randint(0, 100, (3, N_TOKENS), generator=torch.Generator().manual_seed(1))
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0], "rope_theta": 300.0,
        "partial_rotary_factor": 0.7}  # fmt: skip
"""Of Phi-3: 8 of 12 channels are rotated, and the text is longer than the original context."""
LOCAL = ["sliding_attention", "full_attention"]
MODELS = {
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral, no window": ("mistral", {"sliding_window": None, "head_dim": 32, "tie_word_embeddings": True}),
    "mistral, long window": ("mistral", {"sliding_window": 64, "num_key_value_heads": 1}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "smollm3, windows without RoPE": (
        "smollm3", {"no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 5, "tie_word_embeddings": True},
    ),
    "smollm3, biases": (
        "smollm3", {"num_hidden_layers": 4, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    ),
    "phi3": ("phi3", {"sliding_window": 5}),
    "phi3, one kv head, tied": ("phi3", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "phi3, part of a head, longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 16}),
    "gemma3": (
        "gemma3_text",
        {"layer_types": LOCAL, "sliding_window": 5, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 24,
         "tie_word_embeddings": True},
    ),
    "gemma3, a rope by kind, biases": (
        "gemma3_text",
        {"layer_types": LOCAL[::-1], "sliding_window": 5, "attention_bias": True, "num_key_value_heads": 1,
         "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}},
    ),
    "olmo2": ("olmo2", {}),
    "olmo2, biases, one kv head": ("olmo2", {"attention_bias": True, "num_key_value_heads": 1}),
    "olmo2, wide heads, tied": ("olmo2", {"head_dim": 32, "num_key_value_heads": 4, "tie_word_embeddings": True}),
}  # fmt: skip
"""Name -> ``model_type``, configuration."""


@pytest.fixture(params=MODELS)
def model(request, checkpoint):
    kind, changes = MODELS[request.param]
    return open_model(checkpoint(kind, **changes))


def open_model(folder, dtype=torch.float32):
    return BlockwiseModel(ModelSource(folder), dtype, torch.device("cpu"))


def installed(model):
    return AutoModelForCausalLM.from_pretrained(
        model.source.folder, dtype=model.dtype, attn_implementation="sdpa"
    ).eval()


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def logits(model, run=forward, positions=None):
    hidden = model.embed(TOKENS)
    positions = positions or model.positions(N_TOKENS)
    for index in range(model.n_blocks):
        with model.block(index) as block:
            hidden = run(block, hidden, positions)
    with model.head() as head:
        return head(hidden)


def test_logits_block_by_block_in_stages_and_as_a_whole_are_those_of_transformers(model):
    with torch.no_grad():
        expected = installed(model)(TOKENS).logits
        in_stages = logits(model, lambda block, hidden, positions: finish(staged(block, hidden, positions)))
        assert relative(logits(model), expected) < 1e-5
        assert relative(in_stages, expected) < 1e-5
        assert relative(model.materialise()(TOKENS).logits, expected) < 1e-5


def test_a_module_run_by_itself_has_the_window_of_its_block(model):
    hidden, positions = model.embed(TOKENS), model.positions(N_TOKENS)
    for index in range(model.n_blocks):
        with torch.no_grad(), model.block(index) as block:
            run = staged(block, hidden, positions)
            inputs = {stage.name: next(run).inputs for stage in stages_of(model.architecture.family)}
            for stage, last, linear in (("qkv", "o", "self_attn.o_proj"), ("gate_up", "down", "mlp.down_proj")):
                expected = block.get_submodule(linear)(inputs[last])
                torch.testing.assert_close(behind(block, stage, inputs[stage], positions), expected)
            hidden = finish(run)


def test_stages_announce_the_inputs_of_their_linears_and_use_weights_that_changed(model):
    hidden = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(2))
    positions, seen = model.positions(9), {}
    with torch.no_grad(), model.block(1) as block:
        linears = [name for stage in stages_of(model.architecture.family) for name in stage.linears]
        hooks = [
            block.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: seen.update({name: args[0].clone()})
            )
            for name in linears
        ]
        expected = forward(block, hidden, positions)
        for hook in hooks:
            hook.remove()
        modules, run = dict(block.named_modules()), staged(block, hidden, positions)
        for stage in stages_of(model.architecture.family):
            announced = next(run)
            assert all(torch.equal(announced.inputs, seen[name]) for name in stage.linears)
            assert (announced.residual is not None) == stage.adds
        assert torch.equal(finish(run), expected)
        assert dict(block.named_modules()) == modules, "swapped modules were not put back"
        # A linear that is rounded while the block is paused counts from there on.
        run = staged(block, hidden, positions)
        for stage in stages_of(model.architecture.family):
            next(run)
            for name in stage.linears:
                block.get_submodule(name).weight.mul_(0.5)
        assert torch.equal(finish(run), forward(block, hidden, positions))
        assert not torch.equal(forward(block, hidden, positions), expected)


def test_the_checkpoint_has_the_tensors_that_the_configuration_describes(model):
    stored = {name: tensor.shape for name, tensor in model.source.tensors.items()}
    assert stored == from_config(model.source.config).tensor_shapes()
    digest(ModelSpec(name="local", path=str(model.source.folder)))
    assert not model.source.remarks


def test_perplexity_is_that_of_transformers_on_the_same_windows(model):
    whole = installed(model)
    with torch.no_grad():
        found = whole(TOKENS).logits[:, :-1]
    expected = functional.cross_entropy(found.flatten(0, 1), TOKENS[:, 1:].flatten()).exp()
    assert perplexity(model, TOKENS, batch_size=2).perplexity == pytest.approx(float(expected), rel=1e-5)


def test_trees_of_continuations_see_what_whole_sequences_see(model):
    """Continuations that share a prefix longer than the sliding window, scored together, have the scores of whole sequences."""
    prefix = TOKENS[0, :17].tolist()
    requests = [(prefix, TOKENS[row, 17 : 17 + length].tolist()) for row, length in ((0, 4), (1, 7), (2, 1))]
    scores = log_likelihoods(model, requests, 128)
    whole = installed(model)
    for (context, continuation), (score, _) in zip(requests, scores, strict=True):
        tokens = torch.tensor([context + continuation])
        with torch.no_grad():
            found = whole(tokens).logits[0, len(context) - 1 : -1].log_softmax(-1)
        expected = found.gather(1, tokens[0, len(context) :, None]).sum()
        assert score == pytest.approx(float(expected), rel=1e-4)


def quantized(model, tmp_path):
    """Run a cell of GPTQ at 3 bits. Returns its result and its codes."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The {a} cat saw {b} red birds.|" for a in range(20) for b in range(10)))
    spec = compose_cell(
        [
            "+method=gptq", "bitwidth=w3", "model=local", f"model.path={model}", "calibration=file", f"calibration.path={text}",
            "calibration.separator='|'", "calibration.portion=[0,0.8]", "calibration.n_samples=4", "calibration.seq_len=24",
            "evaluation=file", f"evaluation.texts.file.path={text}", "evaluation.texts.file.separator='|'",
            "evaluation.texts.file.portion=[0.9,1]", "evaluation.texts.file.seq_len=24",
            f"execution.runs_dir={tmp_path / 'runs'}",
        ]
    )  # fmt: skip
    folder = create(spec)
    return run_cell(spec, folder), BlockState(folder.state_path, folder.run_id)


@pytest.mark.parametrize("name", ["mistral", "smollm3", "phi3", "gemma3", "olmo2"])
def test_a_quantized_cell_has_rounded_every_linear_and_is_rebuilt_from_its_codes(checkpoint, tmp_path, name):
    """Fused linears are rounded and stored as their parts; the rebuilt whole model has the perplexity of the blockwise one."""
    kind, changes = MODELS[name]
    model = open_model(checkpoint(kind, **changes))
    result, state = quantized(model.source.folder, tmp_path)
    assert math.isfinite(result["metrics"]["file/perplexity"]["value"])
    rows = state.layer_records(model.n_blocks)
    assert [row["linear"] for row in rows] == [*model.architecture.linear_shapes()] * 2
    assert all(0 < row["relative_output_error"] < 1 and row["n_tokens"] == 4 * 24 for row in rows)
    found = perplexity(model, TOKENS, state.overlay).perplexity
    assert found != pytest.approx(perplexity(model, TOKENS).perplexity, rel=1e-7)
    with torch.no_grad():
        whole = model.materialise(state.overlay)(TOKENS).logits[:, :-1]
    expected = functional.cross_entropy(whole.flatten(0, 1), TOKENS[:, 1:].flatten()).exp()
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_a_llama_in_the_form_of_another_family_gets_the_same_codes(checkpoint, tmp_path):
    """Mistral without a window, SmolLM3 with RoPE in every block and Phi-3 compute what Llama computes."""
    folder = checkpoint("llama", hidden_size=64)
    result, state = quantized(folder, tmp_path)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    for kind, own in (("mistral", {"sliding_window": None}), ("smollm3", {"no_rope_layers": [1, 1]}), ("phi3", {})):
        other, held = shutil.copytree(folder, tmp_path / kind), dict(tensors)
        for block in range(2 if kind == "phi3" else 0):
            for whole, parts in FAMILIES["phi3"].fused.items():
                pieces = [held.pop(f"model.layers.{block}.{part}.weight") for part in parts]
                held[f"model.layers.{block}.{whole}.weight"] = torch.cat(pieces)
        save_file(held, other / "model.safetensors", {"format": "pt"})
        (other / "config.json").write_text(json.dumps(config | own | {"model_type": kind}))
        same, codes = quantized(other, tmp_path)
        assert codes.codes_digest(2) == state.codes_digest(2), kind
        value = [of["metrics"]["file/perplexity"]["value"] for of in (same, result)]
        assert value[0] == pytest.approx(value[1], rel=1e-6), kind


def configured(folder, drop=(), **values):
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in drop} | values
    (folder / "config.json").write_text(json.dumps(config))
    return folder


WINDOW = {"use_sliding_window": True, "sliding_window": 4}
HONOURED = {
    "mistral, default window": ("mistral", {}, ("sliding_window",), {}),
    "mistral, layer types of its window": (
        "mistral",
        {"sliding_window": 5},
        (),
        {"layer_types": ["sliding_attention"] * 2},
    ),
    "mistral, null head_dim": ("mistral", {"head_dim": 12}, (), {"head_dim": None}),
    "mistral, yarn": ("mistral", {}, ("rope_parameters",), {"rope_scaling": {"type": "yarn", "factor": 4.0}}),
    "mistral, no biases": ("mistral", {}, (), {"attention_bias": False, "mlp_bias": None}),
    "smollm3, every second without RoPE": (
        "smollm3", {"no_rope_layers": [1, 0]}, ("no_rope_layers", "layer_types"), {"no_rope_layer_interval": 2},
    ),
    "smollm3, more entries than blocks": ("smollm3", {}, ("layer_types",), {"no_rope_layers": [0, 1, 1, 0]}),
    "smollm3, tied by default": ("smollm3", {"tie_word_embeddings": True}, ("tie_word_embeddings",), {}),
    "smollm3, windows by layer types": (
        "smollm3", {}, (), {"layer_types": ["sliding_attention", "full_attention"], **WINDOW},
    ),
    "smollm3, windows by the flag": (
        "smollm3", {}, ("layer_types",), {"no_rope_layers": [0, 1], **WINDOW},
    ),
    "smollm3, null window": ("smollm3", {}, ("layer_types",), {"use_sliding_window": True, "sliding_window": None}),
    "phi3, all heads": ("phi3", {"num_key_value_heads": 4}, ("num_key_value_heads",), {}),
    "phi3, longrope of its files": (
        "phi3", {}, ("rope_parameters",),
        {"rope_scaling": {k: LONG[k] for k in ("short_factor", "long_factor")} | {"type": "longrope"}, "rope_theta": 300.0,
         "partial_rotary_factor": 0.7, "original_max_position_embeddings": 16},
    ),
    "phi3, null window and dropouts": ("phi3", {}, (), {"sliding_window": None, "resid_pdrop": 0.3, "embd_pdrop": 0.3}),
    "phi3, part of a head": ("phi3", {}, ("rope_parameters",), {"partial_rotary_factor": 0.5}),
    "gemma3, every second block sees everything": (
        "gemma3_text", {"sliding_window": 5}, ("layer_types",), {"sliding_window_pattern": 2},
    ),
    "gemma3, windows in five of six": ("gemma3_text", {"sliding_window": 5}, ("layer_types",), {}),
    "gemma3, rope of its first files": (
        "gemma3_text", {"layer_types": LOCAL}, ("rope_parameters",),
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e5, "rope_local_base_freq": 500.0},
    ),
    "gemma3, one rope given": (
        "gemma3_text", {"layer_types": LOCAL}, (), {"rope_parameters": {"full_attention": {"rope_theta": 300.0}}},
    ),
    "gemma3, what its files leave out": (
        "gemma3_text", {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True},
        ("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings", "hidden_activation"), {},
    ),
    "gemma3, gelu": ("gemma3_text", {"hidden_activation": "gelu"}, (), {"hidden_act": "gelu"}),
    "olmo2, all heads": ("olmo2", {"num_key_value_heads": 4}, ("num_key_value_heads",), {}),
    "olmo2, yarn": ("olmo2", {}, ("rope_parameters",), {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}, "rope_theta": 5e5}),
    "olmo2, layer types": ("olmo2", {}, (), {"layer_types": ["full_attention"] * 2}),
}  # fmt: skip
"""Name -> ``model_type``, configuration when made, keys to drop from config.json, and what to write there."""


@pytest.mark.parametrize("name", HONOURED)
def test_what_a_configuration_asks_for_is_done_as_transformers_does_it(checkpoint, name):
    kind, changes, drop, values = HONOURED[name]
    model = open_model(configured(checkpoint(kind, **changes), drop, **values))
    digest(ModelSpec(name="local", path=str(model.source.folder)))
    with torch.no_grad():
        assert relative(logits(model), installed(model)(TOKENS).logits) < 1e-5


REFUSED = {
    "mistral, biases": ("mistral", {"attention_bias": True}, "attention_bias True .*no effect in the mistral"),
    "mistral, biases of the MLP": ("mistral", {"mlp_bias": True}, "mlp_bias"),
    "mistral, other layer types": (
        "mistral",
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types.*differs",
    ),
    "mistral, window as text": ("mistral", {"sliding_window": "4"}, "sliding_window must be a positive integer"),
    "mistral, window 0": ("mistral", {"sliding_window": 0}, "sliding_window must be a positive integer"),
    "mistral, soft cap": ("mistral", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
    "mistral, bidirectional": (
        "mistral",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention must be false",
    ),
    "mistral, part of a head": ("mistral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "smollm3, blocks without entry": ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers must be a list of 0 and 1"),
    "smollm3, RoPE as text": ("smollm3", {"no_rope_layers": ["1", "0"]}, "no_rope_layers"),
    "smollm3, interval 0": ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval"),
    "smollm3, windows without width": ("smollm3", {"layer_types": ["sliding_attention"] * 2}, "sliding_window must be"),
    "smollm3, soft cap": ("smollm3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0.*smollm3"),
    "phi3, llama3": (
        "phi3",
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
        "rope_type 'llama3'.*known: default, longrope",
    ),
    "phi3, the first name of longrope": (
        "phi3",
        {"rope_scaling": {"type": "su"}},
        "rope_type 'su'.*known: default, longrope",
    ),
    "phi3, factors of a whole head": (
        "phi3",
        {"rope_parameters": LONG | {"partial_rotary_factor": 1.0}},
        "short_factor must be a list of 6",
    ),
    "phi3, share above 1": (
        "phi3",
        {"rope_parameters": {"partial_rotary_factor": 1.5}},
        "partial_rotary_factor must be",
    ),
    "phi3, odd share": (
        "phi3",
        {"rope_parameters": {"partial_rotary_factor": 0.6}},
        "even share of head_dim 12, got 0.6",
    ),
    "phi3, bias of the head": ("phi3", {"lm_head_bias": True}, "lm_head_bias True"),
    "gemma3, soft cap of attention": (
        "gemma3_text",
        {"attn_logit_softcapping": 50.0},
        "attn_logit_softcapping 50.0.*gemma3_text",
    ),
    "gemma3, soft cap 0": (
        "gemma3_text",
        {"final_logit_softcapping": 0.0},
        "final_logit_softcapping must be null or a positive",
    ),
    "gemma3, bidirectional": (
        "gemma3_text",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention must be false",
    ),
    "gemma3, one rope for all": (
        "gemma3_text",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "rope_parameters must map",
    ),
    "gemma3, llama3": (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"rope_type": "llama3"}}},
        "'llama3'.*known: default, linear",
    ),
    "gemma3, no factor": (
        "gemma3_text",
        {"rope_scaling": {"rope_type": "linear"}},
        "rope_parameters of full_attention.*no 'factor'",
    ),
    "gemma3, the first name of rope_type": (
        "gemma3_text",
        {"rope_scaling": {"type": "linear", "factor": 8.0}},
        "type 'linear' of rope_scaling.*call it rope_type",
    ),
    "gemma3, pattern 0": (
        "gemma3_text",
        {"layer_types": None, "sliding_window_pattern": 0},
        "sliding_window_pattern must be a positive integer",
    ),
    "gemma3, two activations": (
        "gemma3_text",
        {"hidden_act": "silu"},
        "hidden_act 'silu'.*no effect beside hidden_activation",
    ),
    "gemma3, chunks": ("gemma3_text", {"layer_types": ["chunked_attention"] * 2}, "'chunked_attention'"),
    "olmo2, clipped": ("olmo2", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
    "olmo2, windows": ("olmo2", {"sliding_window": 4}, "sliding_window 4 .*no effect in the olmo2"),
    "olmo2, windows of olmo3": ("olmo2", {"layer_types": LOCAL}, "layer_types.*'sliding_attention'"),
    "olmo2, biases of the MLP": ("olmo2", {"mlp_bias": True}, "mlp_bias True"),
    "mistral, no kv heads": ("mistral", {"num_key_value_heads": "2"}, "num_key_value_heads"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_installed_class_ignores_or_cannot_do_is_refused_by_name(checkpoint, name):
    kind, values, words = REFUSED[name]
    folder = configured(checkpoint(kind), **values)
    with pytest.raises((ConfigError, UnsupportedError), match=words) as refusal:
        digest(ModelSpec(name="local", path=str(folder)))
    assert "\n" not in str(refusal.value)


def with_images(folder):
    """Save a random model of images and texts, as google/gemma-3-4b-pt is one."""
    from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration

    from ptqbench.models.source import embedded_model_folder

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_folder("tiny"))
    text = dict(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=76, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=5, layer_types=LOCAL, max_position_embeddings=128,
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    built = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=3)
    )
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.normal_(std=0.3 if "norm" in name else 0.15)
    built.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_of_a_model_of_images_and_texts_the_text_part_is_run(tmp_path, prefix, caplog):
    """Under the names of the first files, and under those of transformers 5."""
    folder = with_images(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    renamed = {
        re.sub(r"^(language_model\.model|model\.language_model)\.", prefix, name): t for name, t in tensors.items()
    }
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    assert any(name.startswith(prefix) for name in renamed)
    digest(ModelSpec(name="local", path=str(folder)))
    assert "of which only the text part is run" in caplog.text
    model = open_model(folder)
    with torch.no_grad():
        expected = installed(model)(TOKENS).logits
        assert relative(logits(model), expected) < 1e-5
        assert relative(model.materialise()(TOKENS).logits, expected) < 1e-5


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping in text_config"),
        ({"model_type": "llama"}, "text_config of a gemma3 model"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ],
)
def test_what_the_whole_of_images_and_texts_ignores_is_refused(tmp_path, section, words):
    folder = with_images(tmp_path / "model")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    configured(folder, text_config=text | section)
    with pytest.raises((ConfigError, UnsupportedError), match=words):
        digest(ModelSpec(name="local", path=str(folder)))
