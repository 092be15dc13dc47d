"""The block loop against the textbook loop, and resume against an undisturbed run."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from ptqbench.engine.blocks_on_disk import BlockState
from ptqbench.engine.pipeline import Method, Timings, quantize
from ptqbench.errors import ConfigError, NumericalError
from ptqbench.methods.refinements import NoRefinement
from ptqbench.methods.solvers import Gptq, RoundToNearest
from ptqbench.methods.targets import Weight
from ptqbench.models.architecture import ATTENTION_INPUT, ATTENTION_OUTPUT, MLP_INPUT, MLP_OUTPUT
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.source import ModelSource
from ptqbench.numerics.gptq import gptq
from ptqbench.numerics.grid import GridSpec, uniform_grid

GROUPS = (ATTENTION_INPUT, ATTENTION_OUTPUT, MLP_INPUT, MLP_OUTPUT)
WINDOWS = torch.randint(0, 100, (6, 24), generator=torch.Generator().manual_seed(5))


def open_model(folder):
    return BlockwiseModel(ModelSource(folder), torch.float32, torch.device("cpu"))


def method(bits=3, group_size=None, solver=None, true_sequential=True):
    return Method(Weight(), solver or Gptq(), NoRefinement(), GridSpec(bits, group_size=group_size), true_sequential)


def run(folder, state_folder, settings, windows=WINDOWS, run_id="a" * 12, on_block=lambda index: None):
    state = BlockState(state_folder, run_id)
    model = open_model(folder)
    quantize(model, settings, windows, state, Timings(), on_block)
    return model, state


def textbook(folder, settings):
    """GPTQ as every fork does it: hooks, the whole model run again before each group, one Hessian per linear."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for layer in model.model.layers:
        waves = GROUPS if settings.true_sequential else [sum(GROUPS, ())]
        for wave in waves:
            moments, hooks = {}, []
            for name in wave:
                moments[name] = 0.0

                def collect(_, args, name=name, moments=moments):
                    x = args[0].reshape(-1, args[0].shape[-1]).double()
                    moments[name] = moments[name] + x.T @ x

                hooks.append(layer.get_submodule(name).register_forward_pre_hook(collect))
            with torch.no_grad():
                for window in WINDOWS:
                    model(window[None])
            for hook in hooks:
                hook.remove()
            for name in wave:
                weight = layer.get_submodule(name).weight
                grid = uniform_grid(weight.shape[1], settings.grid)
                weight.data = gptq(weight.data.double(), moments[name], grid).dequantized.float()
    return model


@pytest.mark.parametrize("true_sequential", [True, False])
@pytest.mark.parametrize(
    ("kind", "changes"), [("llama", {}), ("qwen2", {"tie_word_embeddings": True}), ("qwen3", {"head_dim": 8})]
)
def test_one_pass_equals_the_textbook_loop(checkpoint, tmp_path, kind, changes, true_sequential):
    folder = checkpoint(kind, **changes)
    settings = method(bits=4, group_size=32, true_sequential=true_sequential)
    model, state = run(folder, tmp_path / "state", settings)
    expected = textbook(folder, settings)
    differing = total = 0
    for index in range(model.n_blocks):
        with model.block(index, state.overlay) as block:
            for name in sum(GROUPS, ()):
                ours = block.get_submodule(name).weight
                theirs = expected.model.layers[index].get_submodule(name).weight
                steps = (ours - theirs).abs() > 1e-4
                differing, total = differing + int(steps.sum()), total + steps.numel()
    assert differing / total < 2e-3  # float32 against float64 statistics: a rare rounding tie may fall the other way


def test_true_sequential_matters(checkpoint, tmp_path):
    folder = checkpoint()
    digests = {
        run(folder, tmp_path / str(flag), method(bits=2, true_sequential=flag))[1].codes_digest(2)
        for flag in (True, False)
    }
    assert len(digests) == 2


def test_resume_gives_the_same_bytes_and_redoes_nothing(checkpoint, tmp_path):
    folder = checkpoint("qwen3", num_hidden_layers=3)
    _, whole = run(folder, tmp_path / "whole", method())

    class Killed(Exception):
        pass

    def die_after_first(index):
        if index == 0:
            raise Killed

    with pytest.raises(Killed):
        run(folder, tmp_path / "parts", method(), on_block=die_after_first)
    first = tmp_path / "parts" / "block_0000.safetensors"
    stamp = first.stat().st_mtime_ns
    _, parts = run(folder, tmp_path / "parts", method())
    assert parts.codes_digest(3) == whole.codes_digest(3)
    assert first.stat().st_mtime_ns == stamp
    timeless = [
        [{k: v for k, v in row.items() if k != "quantize_s"} for row in state.layer_records(3)]
        for state in (parts, whole)
    ]
    assert timeless[0] == timeless[1]


def test_truncated_state_is_computed_again(checkpoint, tmp_path):
    folder = checkpoint()
    _, whole = run(folder, tmp_path / "state", method())
    digest = whole.codes_digest(2)
    path = tmp_path / "state" / "block_0001.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    assert not whole.has(1)
    assert run(folder, tmp_path / "state", method())[1].codes_digest(2) == digest


def test_state_of_another_cell_is_refused(checkpoint, tmp_path):
    folder = checkpoint()
    run(folder, tmp_path / "state", method())
    with pytest.raises(ConfigError, match="belongs to aaaaaaaaaaaa, not bbbbbbbbbbbb"):
        run(folder, tmp_path / "state", method(), run_id="b" * 12)


def test_reports_describe_every_linear(checkpoint, tmp_path):
    folder = checkpoint()
    rows = run(folder, tmp_path / "state", method(bits=3, group_size=32))[1].layer_records(2)
    assert [(r["block"], r["linear"]) for r in rows] == [(b, n) for b in range(2) for n in sum(GROUPS, ())]
    down = next(r for r in rows if r["linear"] == "mlp.down_proj")
    assert (down["out_features"], down["in_features"]) == (48, 76)
    assert down["effective_w_bits"] == pytest.approx(3 + 3 * (16 + 3) / 76)  # 76 inputs: groups of 32, 32 and 12
    assert all(r["n_tokens"] == WINDOWS.numel() and 0 < r["relative_output_error"] < 1 for r in rows)
    assert all(r["correction_norm"] == 0 for r in rows)
    assert all(r["relative_target_error"] == r["relative_output_error"] for r in rows)
    nullable = ("correction_damping", "null_space_rank", "row_scale_min", "row_scale_max")
    assert all(r[key] is None for r in rows for key in nullable)


def test_gptq_beats_rounding_to_nearest_on_calibration_output(checkpoint, tmp_path):
    folder = checkpoint()
    rows = {
        name: run(folder, tmp_path / name, method(bits=4, solver=solver))[1].layer_records(2)
        for name, solver in {"gptq": Gptq(), "rtn": RoundToNearest()}.items()
    }
    first = [
        (r["relative_output_error"], n["relative_output_error"]) for r, n in zip(rows["gptq"], rows["rtn"], strict=True)
    ][:3]
    assert all(ours < theirs for ours, theirs in first)  # q, k, v of block 0: the same inputs in both runs


def test_sixteen_bit_weights_stay_bit_identical(checkpoint, tmp_path):
    folder = checkpoint()
    model, state = run(folder, tmp_path / "state", method(bits=16, solver=RoundToNearest()))
    with model.block(0) as block:
        before = {n: p.clone() for n, p in block.named_parameters()}
    with model.block(0, state.overlay) as block:
        assert all(torch.equal(before[n], p) for n, p in block.named_parameters())


def test_failed_factorisation_names_block_and_linears(checkpoint, tmp_path):
    folder = checkpoint()
    settings = dataclasses.replace(method(), solver=Gptq(damping=0.0))
    with pytest.raises(NumericalError, match=r"block 0, q_proj/k_proj/v_proj: .*damping"):
        run(folder, tmp_path / "state", settings, windows=WINDOWS[:1, :10])  # 10 tokens cannot span 48 channels


@pytest.mark.parametrize("true_sequential", [True, False])
def test_overflow_in_float16_names_the_place_and_the_way_out(checkpoint, tmp_path, true_sequential):
    from safetensors.torch import load_file, save_file

    folder = checkpoint("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    method = Method(Weight(), RoundToNearest(), NoRefinement(), GridSpec(8), true_sequential)
    windows = torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        model = BlockwiseModel(ModelSource(folder), dtype, torch.device("cpu"))
        quantize(model, method, windows, BlockState(tmp_path / str(dtype), "a" * 12), Timings())
    model = BlockwiseModel(ModelSource(folder), torch.float16, torch.device("cpu"))
    with pytest.raises(NumericalError, match=r"block 1, input of down_proj: .*float16.* model.dtype=bfloat16"):
        quantize(model, method, windows, BlockState(tmp_path / "float16", "a" * 12), Timings())
