"""The full-precision and the quantized stream in lock-step: what is collected, where, and at what cost."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional
from transformers import AutoModelForCausalLM

from ptqbench.engine.blocks_on_disk import BlockState
from ptqbench.engine.collect import Collector, Wanted, untouched_copy
from ptqbench.engine.pipeline import Method, Timings, quantize
from ptqbench.errors import CalibrationError
from ptqbench.methods.base import Statistic
from ptqbench.methods.refinements import NoRefinement
from ptqbench.methods.solvers import Gptq
from ptqbench.methods.targets import Loaq, Weight
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.quantized import BasisChange, BlockPlan, InputPlan, install
from ptqbench.models.source import ModelSource
from ptqbench.models.stages import STAGES, finish, forward, staged
from ptqbench.numerics.activation import ActivationGrid
from ptqbench.numerics.grid import ColumnRange, GridSpec

WINDOWS = torch.randint(0, 100, (4, 36), generator=torch.Generator().manual_seed(5))
EVERYTHING = frozenset(Statistic)
NAMES = [name for stage in STAGES for name in stage.linears]


@dataclasses.dataclass(frozen=True)
class Asking:
    """Aim at the weight, but have statistics collected."""

    needs: frozenset = EVERYTHING
    rms_scale: str = "split"
    exclude: tuple = ()

    def aim(self, weight, statistics):
        return Weight().aim(weight, statistics)


@dataclasses.dataclass(frozen=True)
class Recording(Gptq):
    """Round as GPTQ and keep the statistics of every stage."""

    seen: list = dataclasses.field(default_factory=list, compare=False)

    def solve(self, aim, statistics, grid, *more, **named):
        self.seen.append(statistics)
        return super().solve(aim, statistics, grid, *more, **named)


class Rewriting(BlockwiseModel):
    """Change every block after loading, by activation quantizers, reordered channels and changes of basis, say."""

    rewrite = staticmethod(lambda block: block)

    @contextmanager
    def block(self, index, overlay=None):
        with super().block(index, overlay) as block:
            yield self.rewrite(block)


def open_model(folder, plan=None):
    model = Rewriting(ModelSource(folder), torch.float32, torch.device("cpu"))
    if plan is not None:
        model.rewrite = lambda block: install(block, plan)
    return model


def run(folder, state_folder, target, solver=None, bits=3, model=None, on_block=lambda index: None, **options):
    settings = Method(target, solver or Gptq(), NoRefinement(), GridSpec(bits), **{"true_sequential": True} | options)
    state = BlockState(state_folder, "a" * 12)
    model = model or open_model(folder)
    quantize(model, settings, WINDOWS, state, Timings(), on_block)
    return model, state


def plan(a_bits=4, basis=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grid = ActivationGrid(bits=a_bits)
    rotation = torch.linalg.qr(torch.randn(48, 48, generator=generator))[0]
    inputs = {name: InputPlan(grid=grid) for name in NAMES}
    inputs["mlp.down_proj"] = InputPlan(grid=grid, order=torch.randperm(76, generator=generator))
    return BlockPlan(inputs=inputs, basis_changes=(BasisChange(rotation), None) if basis else (None, None))


def hooked(model, layer, name, residual_of):
    """Run a whole Hugging Face model over all windows; the inputs of a linear and of a norm, flat, in float64."""
    seen = {name: [], residual_of: []}
    hooks = [
        layer.get_submodule(key).register_forward_pre_hook(lambda _, args, key=key: seen[key].append(args[0]))
        for key in seen
    ]
    with torch.no_grad():
        model(WINDOWS)
    for hook in hooks:
        hook.remove()
    return [torch.cat(seen[key]).flatten(0, 1).double() for key in seen]


def brute_force(full, quantized, index, stage, rms_scale, eps=1e-6):
    """Every statistic of a stage from two whole models with hooks, by its definition, in float64."""
    norm = "post_attention_layernorm" if stage.name == "down" else "input_layernorm"
    name = stage.linears[0]
    layers = [model.model.layers[index] for model in (full, quantized)]
    x, r = hooked(full, layers[0], name, norm)
    xq, rq = hooked(quantized, layers[1], name, norm)
    tokens = len(x)
    d = dq = torch.ones(tokens, 1, dtype=torch.float64)
    if stage.adds:
        linear = layers[0].get_submodule(name)
        bias = 0 if linear.bias is None else linear.bias.detach().double()
        y, yq = (part + inputs @ linear.weight.detach().double().T + bias for part, inputs in ((r, x), (rq, xq)))
        d = (y.square().mean(1, keepdim=True) + eps).rsqrt()
        dq = (yq.square().mean(1, keepdim=True) + eps).rsqrt() if rms_scale == "split" else d
        r, rq = r + bias, rq + bias
    mean = xq.view(len(WINDOWS), -1, xq.shape[1]).mean(0)
    return {
        "second_moment": xq.T @ xq / tokens,
        "cross_moment": (dq * xq).T @ (d * x - dq * xq) / tokens,
        "position_moment": mean.T @ mean,
        "weighted_moment": (dq * xq).T @ (dq * xq) / tokens if stage.adds else None,
        "residual_moment": (dq * xq).T @ (d * r - dq * rq) / tokens if stage.adds else None,
    }


def assert_statistics(found, expected):
    for name, value in expected.items():
        ours = getattr(found, name)
        if value is None:
            assert ours is None, name
        else:
            assert (ours.double() - value).norm() <= 1e-5 * max(1e-3, value.norm()), name


@pytest.mark.parametrize(
    ("kind", "changes", "rms_scale"),
    [
        ("llama", {"attention_bias": True}, "split"),
        ("llama", {"attention_bias": True}, "common"),
        ("qwen2", {}, "split"),
        ("qwen3", {"head_dim": 8}, "split"),
    ],
)
def test_statistics_equal_hooks_on_two_whole_models(checkpoint, tmp_path, kind, changes, rms_scale):
    folder = checkpoint(kind, **changes)
    recording = Recording()
    model, state = run(folder, tmp_path / "state", Asking(rms_scale=rms_scale), recording)
    full, quantized = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    found = iter(recording.seen)
    for index in range(model.n_blocks):
        for stage in STAGES:
            statistics = next(found)
            assert statistics.linears == stage.linears
            assert statistics.n_tokens == WINDOWS.numel()
            assert_statistics(statistics, brute_force(full, quantized, index, stage, rms_scale))
            with model.block(index, state.overlay) as block:
                for name in stage.linears:  # the next stage sees this one rounded
                    quantized.model.layers[index].get_submodule(name).weight.data = block.get_submodule(
                        name
                    ).weight.data
    assert next(found, None) is None


def test_without_true_sequential_the_stages_see_an_unrounded_block(checkpoint, tmp_path):
    folder = checkpoint("qwen2")
    recording = Recording()
    model, state = run(folder, tmp_path / "state", Asking(), recording, true_sequential=False)
    full, quantized = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    for index in range(model.n_blocks):
        for stage, statistics in zip(STAGES, recording.seen[4 * index : 4 * index + 4], strict=True):
            assert_statistics(statistics, brute_force(full, quantized, index, stage, "split"))
        with model.block(index, state.overlay) as block:
            quantized.model.layers[index].load_state_dict(block.state_dict())


def test_members_that_compare_nothing_run_every_linear_once_and_others_twice(checkpoint, tmp_path):
    calls = []

    def count(block):
        for name in NAMES:
            block.get_submodule(name)._forward_hooks.clear()
            block.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
        return block

    folder = checkpoint()
    for target, times in ((Weight(), 1), (Loaq(alpha=0.0, beta=0.0), 1), (Loaq(), 2)):
        calls.clear()
        model = open_model(folder)
        model.rewrite = count
        run(folder, tmp_path / f"{target}", target, model=model)
        assert {name: calls.count(name) for name in NAMES} == dict.fromkeys(NAMES, times * 2 * len(WINDOWS))


def test_without_drift_the_target_is_the_weight(checkpoint, tmp_path):
    folder = checkpoint("qwen2")
    codes = []
    for target in (Weight(), Loaq()):
        model, state = run(folder, tmp_path / type(target).__name__, target)
        with model.block(0, state.overlay) as block:
            codes.append([block.get_submodule(name).weight.clone() for name in NAMES])
        rows = state.layer_records(2)
    assert all(torch.equal(*pair) for pair in list(zip(*codes, strict=True))[:3])
    assert not torch.equal(codes[0][3], codes[1][3])
    assert [row["correction_norm"] == 0 for row in rows] == [True] * 3 + [False] * 11


@pytest.mark.parametrize("basis", [False, True])
def test_staged_rewritten_block_equals_its_forward(checkpoint, basis):
    model = open_model(checkpoint("qwen3"), plan(basis=basis))
    hidden, positions = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(2)), model.positions(9)
    with torch.no_grad(), model.block(0) as block:
        expected = forward(block, hidden, positions)
        steps = staged(block, hidden, positions)
        residuals = [next(steps).residual for _ in STAGES]
        assert torch.equal(finish(steps), expected)
        assert residuals[0] is None
        assert residuals[2] is None
        assert torch.equal(residuals[1], block.basis_changes[0](hidden) if basis else hidden)


@pytest.mark.parametrize("during_calibration", [True, False])
@pytest.mark.parametrize("basis", [False, True])
def test_activation_quantizers_act_in_the_quantized_stream_alone(checkpoint, tmp_path, basis, during_calibration):
    folder = checkpoint()
    recording = Recording()
    model = open_model(folder, plan(basis=basis))
    run(folder, tmp_path / "state", Asking(), recording, bits=16, model=model, during_calibration=during_calibration)

    def inputs_of(index, hidden, enabled):
        """Run blocks one by one: inputs of every stage as the weight sees them, and the stream behind the block."""
        from ptqbench.models.quantized import set_quantizers

        with model.block(index) as block:
            set_quantizers(block, enabled)
            seen = {}
            for stage in STAGES:
                name = stage.linears[0]
                linear = block.get_submodule(name)
                linear.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, m.prepare(args[0])))
            return forward(block, hidden, positions), [seen[stage.linears[0]] for stage in STAGES]

    with torch.no_grad():
        positions, full = model.positions(WINDOWS.shape[1]), model.embed(WINDOWS)
        quantized, drift = full, []
        for index in range(2):
            full, inputs = inputs_of(index, full, False)
            quantized, inputs_q = inputs_of(index, quantized, during_calibration)
            for x, xq, found in zip(inputs, inputs_q, recording.seen[4 * index :], strict=False):
                flat = xq.flatten(0, 1)
                torch.testing.assert_close(found.second_moment, flat.T @ flat / len(flat), rtol=1e-4, atol=1e-5)
                drift.append((x - xq).abs().max() > 0)
                assert bool(found.cross_moment.any()) == bool(drift[-1])
    assert all(drift) if during_calibration else not any(drift)
    with model.block(0) as block:
        assert all(block.get_submodule(name).enabled for name in NAMES)


def test_quantizers_are_on_again_even_after_a_failure(checkpoint, tmp_path):
    folder = checkpoint()
    model, blocks = open_model(folder), []

    def rewrite(block):
        blocks.append(install(block, plan()))
        return block

    model.rewrite = rewrite

    class Failing(Recording):
        def solve(self, aim, statistics, grid, *more, **named):
            assert not blocks[0].get_submodule(NAMES[0]).enabled
            raise KeyError

    with pytest.raises(KeyError):
        run(folder, tmp_path / "state", Weight(), Failing(), model=model, during_calibration=False)
    assert all(blocks[0].get_submodule(name).enabled for name in NAMES)


@pytest.mark.parametrize(("rewritten", "true_sequential"), [(False, True), (False, False), (True, True)])
def test_resume_replays_both_streams(checkpoint, tmp_path, rewritten, true_sequential):
    folder = checkpoint("qwen3", num_hidden_layers=3)
    blocks = plan(basis=True) if rewritten else None
    settings = {"true_sequential": true_sequential}
    _, whole = run(folder, tmp_path / "whole", Loaq(), model=open_model(folder, blocks), **settings)

    class Killed(Exception):
        pass

    def die(index):
        if index == 1:
            raise Killed

    with pytest.raises(Killed):
        run(folder, tmp_path / "parts", Loaq(), model=open_model(folder, blocks), on_block=die, **settings)
    _, parts = run(folder, tmp_path / "parts", Loaq(), model=open_model(folder, blocks), **settings)
    assert parts.codes_digest(3) == whole.codes_digest(3)
    timeless = [
        [{k: v for k, v in row.items() if k != "quantize_s"} for row in state.layer_records(3)]
        for state in (parts, whole)
    ]
    assert timeless[0] == timeless[1]


def test_untouched_copy_shares_memory_and_keeps_its_weights(checkpoint):
    model = open_model(checkpoint(), plan(basis=True))
    hidden, positions = torch.randn(1, 9, 48, generator=torch.Generator().manual_seed(2)), model.positions(9)
    with torch.no_grad(), model.block(0) as block:
        copy = untouched_copy(block)
        pairs = list(zip(block.parameters(), copy.parameters(), strict=True))
        assert len(pairs) > 8
        assert all(ours is theirs for ours, theirs in pairs)
        before = forward(copy, hidden, positions)
        for name in NAMES:
            linear = block.get_submodule(name)
            assert linear.enabled
            linear.weight = torch.nn.Parameter(torch.zeros_like(linear.weight), requires_grad=False)
        assert torch.equal(forward(copy, hidden, positions), before)


def test_grid_of_a_stage_may_split_columns(checkpoint, tmp_path):
    folder = checkpoint()

    def mixed(stage, in_features):
        if stage == "down":
            return (ColumnRange(0, in_features, GridSpec(2)),)
        high = in_features - in_features // 8
        return ColumnRange(0, high, GridSpec(3)), ColumnRange(high, in_features, GridSpec(8))

    state = BlockState(tmp_path / "state", "a" * 12)
    settings = Method(Loaq(), Gptq(), NoRefinement(), mixed, True)
    model = open_model(folder)
    quantize(model, settings, WINDOWS, state, Timings())
    bits = {row["linear"]: row["effective_w_bits"] for row in state.layer_records(2)}
    assert bits["mlp.down_proj"] == pytest.approx(2 + (16 + 2) / 76)
    assert bits["mlp.up_proj"] == pytest.approx((42 * 3 + 6 * 8 + 32 + 3 + 8) / 48)
    with safe_open(state.folder / "block_0001.safetensors", framework="pt") as stored:
        codes, groups = (stored.get_tensor(f"mlp.up_proj.{part}") for part in ("codes", "group_index"))
    assert groups.tolist() == [0] * 42 + [1] * 6
    assert codes[:, :42].max() == 7
    assert codes[:, 42:].max() > 200


def test_comparing_without_a_second_stream_is_refused(checkpoint):
    model = open_model(checkpoint())
    with model.block(0) as block, pytest.raises(CalibrationError, match="stage o: expected a full-precision stream"):
        Collector(STAGES[1], Wanted(EVERYTHING), block, None)


def test_functional_linear_is_what_a_planned_linear_applies(checkpoint):
    model = open_model(checkpoint("qwen2"), plan())
    with torch.no_grad(), model.block(0) as block:
        linear = block.get_submodule("self_attn.q_proj")
        x = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
        assert torch.equal(linear(x), functional.linear(linear.prepare(x), linear.weight, linear.bias))
