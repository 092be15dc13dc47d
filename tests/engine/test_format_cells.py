"""Cells in the formats: numbers per tensor from the calibration, resume, stored bits, every method."""

import dataclasses
import math
import os

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from conftest import random_cell_words
from ptqbench.engine.blocks_on_disk import BlockState
from ptqbench.engine.pipeline import Method, Timings, quantize
from ptqbench.methods.refinements import NoRefinement
from ptqbench.methods.solvers import RoundToNearest
from ptqbench.methods.targets import Weight
from ptqbench.numerics.stored import decode
from ptqbench.run import run_cell
from ptqbench.runs.folder import create
from ptqbench.sweeps.compose import compose_cell
from transforms_at_hand import LINEARS, WINDOWS, cell, member, open_model


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A random model of 2 blocks, 6 windows of 16 tokens for calibration and a few for perplexity."""
    return random_cell_words(tmp_path_factory.mktemp("cells"), 6)


def run(words, *more):
    spec = compose_cell([*words, *more])
    folder = create(spec)
    return run_cell(spec, folder), folder


FORMATS = ["mxfp4", "mxfp4a8", "mxfp6a8", "mxfp8", "mxint8", "nvfp4", "nvfp4a16", "nvfp4_kvnvfp4", "fp8", "fp8_dynamic"]


@pytest.mark.parametrize("bitwidth", FORMATS)
def test_a_cell_of_every_format(words, bitwidth):
    result, folder = run(words, "+method=gptq", f"bitwidth={bitwidth}", "execution.keep_codes=true")
    assert math.isfinite(result["metrics"]["file/perplexity"]["value"])
    layers = pd.read_parquet(folder.layers_path)
    sizes = layers["out_features"] * layers["in_features"]
    stored = (layers["effective_w_bits"] * sizes).sum() / sizes.sum()
    assert result["bits"]["effective_w_bits"] == pytest.approx(stored, abs=1e-9), "planned is stored"
    tensors = load_file(next(folder.state_path.glob("*.safetensors")))
    peaks = {name for name in tensors if name.endswith("peaks")}
    inputs = {f"{linear}.peaks" for linear in LINEARS} <= peaks
    assert inputs == (bitwidth in ("nvfp4", "nvfp4_kvnvfp4", "fp8"))
    assert ("self_attn.kv_quantizer.key_peaks" in peaks) == (bitwidth == "nvfp4_kvnvfp4")
    assert not any(name.endswith("zero_point") for name in tensors)


METHODS = [
    ["+method=rtn"], ["+method=gptq", "method/solver=gptq_act_order"], ["+method=gptaq"], ["+method=qronos"], ["+method=qep"],
    ["+method=loaq"], ["+method=q2n"], ["+method=gptq", "method/refine=scale_refit"], ["+method=quarot"],
    ["+method=resq", "method.transform.n_samples=4"], ["+method=coquant", "method.transform.n_samples=4"],
    ["+method=spinquant", "method.transform.steps=2"],
]  # fmt: skip


@pytest.mark.parametrize("bitwidth", ["mxfp4", "nvfp4_kvfp8", "fp8"])
@pytest.mark.parametrize("method", METHODS, ids=lambda words: " ".join(words))
def test_a_cell_of_every_method(words, method, bitwidth):
    result, _ = run(words, *method, f"bitwidth={bitwidth}")
    assert math.isfinite(result["metrics"]["file/perplexity"]["value"])


def test_row_scales_that_no_scale_takes_up_are_counted(words):
    """Sixteen bits per row beyond the grid, except on the rows that a refinement leaves alone."""
    plain, _ = run(words, "+method=rtn", "bitwidth=mxfp4a16")
    refit, folder = run(
        words, "+method=rtn", "bitwidth=mxfp4a16", "method/refine=scale_refit", "execution.keep_codes=true"
    )
    layers = pd.read_parquet(folder.layers_path)
    rows = layers["out_features"].sum() / (layers["out_features"] * layers["in_features"]).sum()
    bits = [result["bits"]["effective_w_bits"] for result in (refit, plain)]
    assert bits[0] - bits[1] == pytest.approx(16 * rows, abs=1e-9)
    assert refit["bits"]["packed_bytes"] > plain["bits"]["packed_bytes"]
    tensors = load_file(next(folder.state_path.glob("*.safetensors")))
    assert tensors["mlp.up_proj.row_scale"].shape == (76,)
    folded, _ = run(words, "+method=rtn", "bitwidth=fp8_dynamic", "method/refine=scale_refit")
    assert folded["bits"]["effective_w_bits"] < 8.5


def test_q_k_and_v_share_the_number_of_nvfp4_and_not_the_scale_of_fp8(words):
    numbers = {}
    for bitwidth in ("nvfp4a16", "fp8a16"):
        _, folder = run(words, "+method=rtn", f"bitwidth={bitwidth}", "execution.keep_codes=true")
        tensors = load_file(next(folder.state_path.glob("*.safetensors")))
        numbers[bitwidth] = [float(tensors[f"self_attn.{name}_proj.tensor_scale"]) for name in "qkv"]
        weight = decode({key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if "q_proj" in key})
        assert weight.shape == (64, 48)
    assert len(set(numbers["nvfp4a16"])) == 1
    assert len(set(numbers["fp8a16"])) == 3


def test_resumed_cells_have_the_same_bytes(words, tmp_path):
    """The peaks of finished blocks are read back: the streams of the following blocks see the same quantizers."""
    chosen = ["+method=gptq", "bitwidth=nvfp4_kvfp8", "execution.keep_codes=true"]
    whole, _ = run([*words, f"execution.runs_dir={tmp_path / 'whole'}"], *chosen)
    spec = compose_cell([*words, *chosen, f"execution.runs_dir={tmp_path / 'parts'}"])
    folder = create(spec)
    run_cell(spec, folder)
    blocks = sorted(folder.state_path.glob("*.safetensors"))
    os.remove(blocks[1])  # only the first block is finished
    folder.result_path.unlink()
    again = run_cell(spec, folder)
    assert again["bits"]["codes_digest"] == whole["bits"]["codes_digest"]
    assert again["metrics"] == whole["metrics"]


def test_static_ranges_are_those_of_the_calibration(words):
    """A static number, one per token and none at all: other results, all near each other."""
    values = []
    for scale in ("static", "token", "none"):
        result, _ = run(words, "+method=rtn", "bitwidth=nvfp4", f"bitwidth.nv_input_scale={scale}")
        values.append(result["metrics"]["file/perplexity"]["value"])
    assert len(set(values)) == 3
    assert max(values) / min(values) < 1.2
    assert torch.tensor(values).isfinite().all()


def test_peaks_are_the_largest_inputs_and_values_of_the_unrounded_block(checkpoint, tmp_path):
    """Against hooks on the stock model: the first block sees the embedded windows."""
    from transformers import AutoModelForCausalLM

    path = checkpoint()
    spec = cell(4, 4, 8, 8)
    formats = dict(w_format="nvfp4", a_format="nvfp4", kv_format="fp8")
    spec = dataclasses.replace(spec, bitwidth=dataclasses.replace(spec.bitwidth, **formats))
    model = open_model(path, torch.float32)
    precision = member("none").precision(spec, model.architecture)
    model = model.reopened(member("none").basis(spec, model.architecture))
    state = BlockState(tmp_path / "state", "a" * 12)
    grid_of = lambda stage, in_features: precision.weight_grid(stage)
    quantize(model, Method(Weight(), RoundToNearest(), NoRefinement(), grid_of, True), WINDOWS, state, Timings())
    tensors = load_file(sorted((tmp_path / "state").glob("*.safetensors"))[0])

    stock, largest = AutoModelForCausalLM.from_pretrained(path).eval(), {}
    for name in LINEARS:

        def note(_, args, output, name=name):
            for key, tensor in ((name, args[0]), (f"{name} out", output)):
                largest[key] = max(largest.get(key, 0.0), float(tensor.abs().max()))

        stock.model.layers[0].get_submodule(name).register_forward_hook(note)
    with torch.no_grad():
        for window in WINDOWS:
            stock(window[None])
    for name in LINEARS:
        assert tensors[f"{name}.peaks"].tolist() == pytest.approx([largest[name]], rel=1e-5)
    assert float(tensors["self_attn.kv_quantizer.value_peaks"]) == pytest.approx(
        largest["self_attn.v_proj out"], rel=1e-5
    )
    keys = float(tensors["self_attn.kv_quantizer.key_peaks"])
    assert largest["self_attn.k_proj out"] / 1.5 < keys < largest["self_attn.k_proj out"] * 1.5, (
        "RoPE turns pairs of channels"
    )
    with model.block(0, state.overlay) as block:
        assert torch.equal(block.self_attn.q_proj.peaks, tensors["self_attn.q_proj.peaks"])
