"""What makes the block loop fast must not show in what it computes: reading ahead, writing behind, preparing inputs once."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ptqbench.engine.blocks_on_disk import BlockState
from ptqbench.engine.collect import Lockstep
from ptqbench.engine.cost import work
from ptqbench.engine.pipeline import Method, Timings, quantize
from ptqbench.errors import ConfigError
from ptqbench.methods.refinements import NoRefinement
from ptqbench.methods.solvers import Gptq, RoundToNearest
from ptqbench.methods.targets import Loaq, Weight
from ptqbench.models import quantized
from ptqbench.models.architecture import from_config
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.quantized import BlockPlan, InputPlan, install
from ptqbench.models.source import ModelSource
from ptqbench.models.stages import forward, staged
from ptqbench.numerics.activation import ActivationGrid, apply_grid
from ptqbench.numerics.grid import GridSpec
from ptqbench.sweeps.compose import compose_cell
from ptqbench.sweeps.resolve import Known

METHOD = Method(Weight(), RoundToNearest(), NoRefinement(), GridSpec(4), true_sequential=True)
WINDOWS = torch.randint(0, 100, (2, 8), generator=torch.Generator().manual_seed(5))


def open_model(folder):
    return BlockwiseModel(ModelSource(folder), torch.float32, torch.device("cpu"))


def watched(model, monkeypatch):
    """Log which blocks are read, and by which thread."""
    reads, read = [], model._read_from_disk

    def log(index):
        reads.append((index, threading.current_thread() is threading.main_thread()))
        return read(index)

    monkeypatch.setattr(model, "_read_from_disk", log)
    return reads


def test_a_pass_reads_every_block_once_and_all_but_the_first_ahead(checkpoint, monkeypatch):
    model = open_model(checkpoint("llama", num_hidden_layers=4))
    reads = watched(model, monkeypatch)
    for index in range(4):
        with model.block(index):
            pass
    assert reads == [(index, index == 0) for index in range(4)]


def test_blocks_in_any_order_are_those_of_the_file(checkpoint):
    folder = checkpoint("qwen2", num_hidden_layers=4)
    model = open_model(folder)
    for index in (2, 0, 0, 1, 3, 2, 3):
        fresh = open_model(folder)._read_module(f"model.layers.{index}")
        tensors = model.tensors(index)
        assert tensors.keys() == fresh.keys()
        assert all(torch.equal(tensors[name], fresh[name]) for name in fresh)


def test_a_damaged_block_fails_when_its_turn_comes(checkpoint, monkeypatch):
    model = open_model(checkpoint("llama", num_hidden_layers=3))
    read = model._read_from_disk

    def damaged(index):
        if index == 1:
            raise ConfigError(f"block {index} is damaged")
        return read(index)

    monkeypatch.setattr(model, "_read_from_disk", damaged)
    with model.block(0):
        pass
    with pytest.raises(ConfigError, match="block 1 is damaged"), model.block(1):
        pass
    with model.block(2):
        pass


def test_a_block_counts_once_it_is_on_disk(checkpoint, tmp_path):
    state, seen = BlockState(tmp_path, "a" * 12), []
    folder = checkpoint("llama", num_hidden_layers=3)
    quantize(
        open_model(folder), METHOD, WINDOWS, state, Timings(), lambda index: seen.append((index, state.has(index)))
    )
    assert seen == [(0, True), (1, True), (2, True)]


def test_what_saving_raises_ends_the_work(checkpoint, tmp_path, monkeypatch):
    state = BlockState(tmp_path, "a" * 12)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(BlockState, "save", full)
    with pytest.raises(OSError, match="no space left"):
        quantize(open_model(checkpoint("llama")), METHOD, WINDOWS, state, Timings())


def test_a_block_being_written_survives_a_failure_of_the_next(checkpoint, tmp_path, monkeypatch):
    model, state = open_model(checkpoint("llama", num_hidden_layers=3)), BlockState(tmp_path, "a" * 12)
    block = model.block

    def failing(index, overlay=None):
        if index == 1:
            raise ConfigError("nothing to see")
        return block(index, overlay)

    monkeypatch.setattr(model, "block", failing)
    with pytest.raises(ConfigError, match="nothing to see"):
        quantize(model, METHOD, WINDOWS, state, Timings())
    assert (state.has(0), state.has(1)) == (True, False)


def digest(folder, state_folder, settings):
    model, state = open_model(folder), BlockState(state_folder, "a" * 12)
    quantize(model, settings, WINDOWS, state, Timings())
    return state.codes_digest(model.n_blocks)


@pytest.mark.parametrize("true_sequential", [True, False])
@pytest.mark.parametrize("target", [Weight(), Loaq()], ids=["one stream", "two streams"])
def test_parked_windows_give_the_same_codes(checkpoint, tmp_path, monkeypatch, target, true_sequential):
    settings = Method(target, Gptq(), NoRefinement(), GridSpec(3), true_sequential)
    folder, parked = checkpoint("qwen2"), []
    expected = digest(folder, tmp_path / "a", settings)
    park = Lockstep.park
    monkeypatch.setattr(Lockstep, "park", lambda window: parked.append(window._parks) or park(window))
    monkeypatch.setattr(BlockwiseModel, "parking_place", lambda *_: torch.device("cpu"))
    assert digest(folder, tmp_path / "b", settings) == expected
    assert parked == [True] * (2 * 4 * len(WINDOWS)), "every window at every stage of two blocks"


def test_a_parked_run_holds_nothing_but_what_waits_elsewhere(checkpoint):
    """On the meta device nothing can be computed, so the way there and back shows what is moved."""
    model = open_model(checkpoint("llama"))
    hidden, positions = torch.randn(1, 5, 48), model.positions(5)
    with torch.no_grad(), model.block(0) as block:
        run = staged(block, hidden, positions, torch.device("meta"))
        inputs = weakref.ref(next(run).inputs)
        assert inputs() is not None
        assert next(run) is None
        gc.collect()
        assert inputs() is None, "the input of a stage stayed where it was"
        with pytest.raises(NotImplementedError):  # from meta nothing comes back
            next(run)


PLAN = {
    name: InputPlan(grid=ActivationGrid(4))
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
}


def test_linears_with_one_input_quantize_it_once(checkpoint, monkeypatch):
    calls = []
    monkeypatch.setattr(quantized, "apply_grid", lambda x, *a: calls.append(1) or apply_grid(x, *a))
    model = open_model(checkpoint("qwen2"))
    hidden, positions = torch.randn(1, 7, 48, generator=torch.Generator().manual_seed(0)), model.positions(7)
    with torch.no_grad(), model.block(0) as block:
        expected_block = copy.deepcopy(block)
        shared = forward(install(block, BlockPlan(PLAN)), hidden, positions)
        assert len(calls) == 2, "once for q, k, v and once for gate, up"
        alone = install(expected_block, BlockPlan(PLAN))
        for name in PLAN:  # each with a memory of its own
            alone.get_submodule(name)._prepared = quantized._Prepared()
        assert torch.equal(shared, forward(alone, hidden, positions))
        assert len(calls) == 2 + 5


def test_a_prepared_input_is_forgotten_with_its_input_and_after_changes():
    linear = quantized.QuantizedLinear(nn.Linear(8, 3), InputPlan(grid=ActivationGrid(4)))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    first = linear.prepare(x)
    assert linear.prepare(x) is first
    x.mul_(2.0)
    assert torch.equal(linear.prepare(x), apply_grid(x, ActivationGrid(4)))
    linear.enabled = False
    assert linear.prepare(x) is x
    linear.enabled = True
    kept = weakref.ref(linear.prepare(x))
    del first, x
    gc.collect()
    assert kept() is None, "a prepared input outlived its input"


def test_counted_operations_of_a_forward_are_those_that_torch_counts(checkpoint):
    folder = checkpoint("qwen2", num_hidden_layers=2)
    model, tokens = open_model(folder), 24
    hidden, positions = torch.randn(1, tokens, 48), model.positions(tokens)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), model.block(0) as block, counter:
        forward(block, hidden, positions)
    counted = {str(name): flop for name, flop in counter.get_flop_counts()["Global"].items()}
    products = sum(flop for name, flop in counted.items() if "mm" in name)
    shape = from_config(ModelSource(folder).config)
    spec = compose_cell(["+method=gptq", "model=tiny", "bitwidth=w3", "calibration.n_samples=1"])
    spec_tokens = spec.calibration.seq_len
    ours = work(spec, shape, {}).flop["forward"] / shape.n_blocks / spec_tokens
    seen = 2 * (spec_tokens / 2) * 2 * shape.q_dim  # scores and sums of the half of a window that a token sees
    assert products == tokens * (ours - seen)


def test_work_follows_what_a_method_needs():
    shape = from_config(Known().config(compose_cell(["+method=rtn", "model=tiny", "bitwidth=w3"]).model))
    flop = {
        name: work(compose_cell([f"+method={name}", "model=tiny", "bitwidth=w3"]), shape, {"tiny": 1000}).flop
        for name in ("rtn", "gptq", "loaq")
    }
    assert "round" not in flop["rtn"]
    assert "reference" not in flop["gptq"]
    assert flop["loaq"]["reference"] == flop["loaq"]["forward"] == flop["gptq"]["forward"]
    assert flop["loaq"]["moment"] > 2 * flop["gptq"]["moment"]
    unquantized = compose_cell(["+method=fp16", "model=tiny"])
    assert set(work(unquantized, shape, {"tiny": 1000}).flop) == {"perplexity"}
    coquant = work(compose_cell(["+method=coquant", "model=tiny"]), shape, {})
    assert coquant.n_tokens["bases"] > coquant.n_tokens["calibration"] > 0
    assert coquant.flop["bases"] > 0


def test_timings_add_up_and_count_what_fails():
    timings = Timings()
    for _ in range(2):
        with timings.measure("a"), timings.measure("b"):
            threading.Event().wait(0.01)
    with pytest.raises(ValueError, match="x"), timings.measure("c"):
        raise ValueError("x")
    assert timings.seconds["a"] >= timings.seconds["b"] >= 0.02
    assert "c" in timings.seconds
