"""Pruned models: what is always zero is rounded all the same, and the layer records say what was done."""

import math

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_contract import SHORT, cell, perplexity

from ptqbench.cell.folders import group_names
from ptqbench.methods.eigenbases import diagonalised
from ptqbench.runs.folder import create as create_folder
from ptqbench.runs.folder import read_json

BLOCK = "model.layers.{}."


def pruned(folder):
    """Zero a value head, a key head, a row, an input, and in the last block the inputs of o and down; one channel is constant."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    first, last = BLOCK.format(0), BLOCK.format(1)
    tensors[first + "self_attn.v_proj.weight"][16:] = 0
    tensors[first + "self_attn.k_proj.weight"][:16] = 0
    tensors[first + "self_attn.q_proj.weight"][3] = 0
    tensors[first + "post_attention_layernorm.weight"][7] = 0
    tensors[last + "self_attn.v_proj.weight"].zero_()
    tensors[last + "mlp.up_proj.weight"].zero_()
    tensors["model.embed_tokens.weight"][:, 11] = 0.3
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def remarks(spec):
    rows = pyarrow.parquet.read_table(create_folder(spec).layers_path).to_pylist()
    return {(row["block"], row["linear"].rpartition(".")[2]): row["degenerate"] for row in rows if row["degenerate"]}


def run(folder, tmp_path, method, *words):
    words = [f"+method={method}", *words]
    short = SHORT.get(cell(folder, tmp_path, *words).method.transform.name.split("_")[0], [])
    spec = cell(folder, tmp_path, *words, *short)
    return spec, perplexity(spec)


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in group_names("method") if name != "fp16"])
def test_every_method_runs_on_a_pruned_model(checkpoint, tmp_path, method):
    spec, value = run(pruned(checkpoint()), tmp_path, method)
    assert math.isfinite(value)
    assert remarks(spec)[1, "o_proj"] == "no input: rounded to nearest"


def test_the_layer_records_say_what_was_done(checkpoint, tmp_path):
    folder = pruned(checkpoint())
    nothing = {(1, name): "no input: rounded to nearest" for name in ("o_proj", "down_proj")}
    nothing |= {(1, name): "the weight is zero" for name in ("v_proj", "up_proj")}
    partly = {(0, "o_proj"): "32 of 64", (0, "gate_proj"): "1 of 48", (0, "up_proj"): "1 of 48"}
    for method, kept in (("rtn", "rounded to nearest"), ("gptq", "zero")):
        said = {key: f"{which} inputs are zero: their columns are {kept}" for key, which in partly.items()}
        assert remarks(run(folder, tmp_path, method)[0]) == said | nothing
    spec, _ = run(folder, tmp_path, "coquant")
    assert remarks(spec) == nothing | {
        (0, "o_proj"): "32 of 64 inputs are zero: their columns are zero",
        (0, "k_proj"): "key basis of head 0 is the identity: what it diagonalises is zero",
        (0, "v_proj"): "value basis of head 1 is the identity: what it diagonalises is zero",
        (1, "v_proj"): "the weight is zero; value basis of head 0, 1 is the identity: what it diagonalises is zero",
    }


@pytest.mark.parametrize("words", [["loaq"], ["loaq", "method/target=loaq_sublayer", "method.target.alpha=0.5"]])
def test_a_target_that_moves_a_zero_weight_leaves_finite_figures(checkpoint, tmp_path, words):
    """LoaQ gives o and down a target even where their weight is zero: nothing can be said relative to that weight."""
    folder = checkpoint()
    tensors = load_file(folder / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"{BLOCK.format(1)}{name}.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    spec, value = run(folder, tmp_path, *words, "bitwidth=w3")
    assert math.isfinite(value)
    assert remarks(spec) == {(1, name): "the weight is zero" for name in ("o_proj", "down_proj")}
    for row in pyarrow.parquet.read_table(create_folder(spec).layers_path).to_pylist():
        figures = [row[name] for name in ("relative_weight_error", "relative_output_error", "correction_norm")]
        if row["degenerate"]:
            assert figures == [None, None, None]
        else:
            assert all(math.isfinite(figure) for figure in figures)
        assert math.isfinite(row["relative_target_error"])


def test_a_sound_model_has_no_remarks_and_coquant_keeps_its_coefficients(checkpoint, tmp_path):
    spec, _ = run(checkpoint(), tmp_path, "coquant")
    assert remarks(spec) == {}
    said = read_json(create_folder(spec).bases_path)
    assert set(said) == {"0", "1"}
    for block in said.values():
        assert set(block) == {"attention", "mlp"}
        for numbers in block.values():
            assert set(numbers) == {"lambda_x", "lambda_w", "gamma_low"}
            assert numbers["gamma_low"] == pytest.approx(2 / 7**2 / (48 - 6))
            assert min(numbers["lambda_x"], numbers["lambda_w"]) > 0


def test_a_zero_matrix_in_a_stack_gets_the_identity_and_leaves_the_others_alone():
    root = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = root @ root.mT
    sound = diagonalised("value", moments)
    assert set(sound) == {"value"}
    moments[1] = 0
    found = diagonalised("value", moments)
    assert torch.equal(found["value"][1], torch.eye(8, dtype=torch.float64))
    assert torch.equal(found["value"][[0, 2]], sound["value"][[0, 2]])
    assert found["value_identity"].tolist() == [0, 1, 0]


@pytest.mark.parametrize("method", ["quarot", "resq", "coquant"])
def test_a_transform_with_nothing_rounded_keeps_the_function(checkpoint, tmp_path, method):
    folder = checkpoint()
    _, plain = run(folder, tmp_path, "fp16")
    spec, value = run(folder, tmp_path, method, "bitwidth=fp16")
    assert value != plain  # the transform was applied
    assert value == pytest.approx(plain, rel=1e-4)
    assert not create_folder(spec).layers_path.exists()


def test_coquant_quantizes_keys_and_values_alone(checkpoint, tmp_path):
    folder, words = checkpoint(), ["bitwidth.w_bits=16", "bitwidth.a_bits=16"]
    spec, value = run(folder, tmp_path, "coquant", *words)
    _, plain = run(folder, tmp_path, "fp16")
    assert value == pytest.approx(plain, rel=0.2)
    assert value != plain
    (numbers,) = {block["mlp"]["gamma_low"] for block in read_json(create_folder(spec).bases_path).values()}
    assert numbers == pytest.approx(2 / 7**2 / (48 - 6))  # 4 bits stand in
