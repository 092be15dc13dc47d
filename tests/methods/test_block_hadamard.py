"""Hadamard transforms inside blocks of channels, and MR-GPTQ, which is made of them."""

import dataclasses

import pytest
import torch

from ptqbench.engine.collect import Collector, Wanted
from ptqbench.errors import ConfigError
from ptqbench.methods.base import Statistic
from ptqbench.methods.block_hadamard import by_blocks
from ptqbench.models.quantized import InputPlan, QuantizedLinear
from ptqbench.models.stages import STAGES, StageInput
from ptqbench.numerics.activation import ActivationGrid, apply_grid
from ptqbench.numerics.hadamard import hadamard_transform
from ptqbench.sweeps.compose import compose_cell
from ptqbench.sweeps.resolve import skip_reason
from transforms_at_hand import LINEARS, SHAPE, cell, member

GOLDEN = [34, -2, -4, 0, -8, 0, 0, 0, -16, 0, 0, 0, 0, 0, 0, 0]


def test_golden_vector_and_inverse():
    x = torch.arange(1.0, 17.0)
    assert by_blocks(x, 16).tolist() == GOLDEN
    assert by_blocks(torch.cat([x, 2 * x]), 16).tolist() == [*GOLDEN, *(2 * g for g in GOLDEN)]
    y = torch.randn(3, 5, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(by_blocks(by_blocks(y, 32), 32), y, rtol=0, atol=1e-12)
    assert torch.equal(by_blocks(y[..., :64], 64), hadamard_transform(y[..., :64])), "one block is the whole transform"


def test_blocks_are_those_of_the_format_and_divide_every_width():
    sizes = lambda block, words: member("block_hadamard", block=block).sizes(
        compose_cell(["model=tiny", "+method=rtn", *words]), SHAPE
    )
    assert set(sizes("auto", ["bitwidth=nvfp4"]).values()) == {16, 4}  # widths 48, 64 and 76
    assert sizes("auto", ["bitwidth=mxfp4"])["self_attn.o_proj"] == 32
    assert sizes("auto", ["bitwidth=fp8"])["self_attn.o_proj"] == sizes(128, ["bitwidth=w4"])["self_attn.o_proj"] == 64
    assert sizes(16, ["bitwidth=mxfp4"])["mlp.down_proj"] == 4
    odd = dataclasses.replace(SHAPE, intermediate_size=77)
    assert "the 77 inputs of mlp.down_proj have no block of 4" in member("block_hadamard").skip_reason(cell(), odd)
    assert member("block_hadamard").skip_reason(cell(), SHAPE) is None


def test_every_linear_has_one_and_those_with_one_input_share_it():
    plan = member("block_hadamard").basis(cell(16, 16, 16, 16), SHAPE).plan(0)
    assert set(plan.inputs) == set(LINEARS)
    online = [plan.inputs[f"self_attn.{name}_proj"].online for name in "qkv"]
    assert online[0] is online[1] is online[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], None), (["bitwidth=mxfp4", "bitwidth.mx_scale=four_thirds"], None),
        (["bitwidth=w4"], "fpq_mse is for the weight formats mxfp4, nvfp4, got int"),
    ],
)  # fmt: skip
def test_mr_gptq_is_its_parts(words, said):
    spec = compose_cell(["model=tiny", "+method=mr_gptq", *words])
    assert spec.method.transform.name == "block_hadamard"
    assert (spec.method.solver.options["act_order"], spec.method.solver.options["static_groups"]) == (True, True)
    assert (spec.method.grid.scale_search, spec.method.activation.moment_input) == ("fpq_mse", "plain")
    reason = skip_reason(spec)
    assert reason is None if said is None else said in reason
    with pytest.raises(ConfigError, match="moment_input=plain has no effect with during_calibration=false"):
        compose_cell(["model=tiny", "+method=mr_gptq", "method.activation.during_calibration=false"])


def test_plain_moments_are_those_before_the_quantizer_and_behind_the_transform():
    grid, generator = ActivationGrid(4, format="nvfp4", static=False), torch.Generator().manual_seed(1)
    block = torch.nn.Module()
    block.mlp = torch.nn.Module()
    linear = torch.nn.Linear(64, 8, bias=False)
    block.mlp.down_proj = QuantizedLinear(linear, InputPlan(lambda x: by_blocks(x, 16), grid))
    x = torch.randn(2, 30, 64, generator=generator)
    turned = by_blocks(x, 16).reshape(-1, 64)
    for plain, seen in ((True, turned), (False, apply_grid(turned, grid))):
        wanted = Wanted(frozenset({Statistic.SECOND_MOMENT}), plain=plain)
        collector = Collector(STAGES[3], wanted, block, None)
        collector.add(StageInput(x, None), None)
        torch.testing.assert_close(collector.statistics().second_moment, seen.T @ seen / len(seen))
        assert block.mlp.down_proj.enabled, "the stream keeps its quantizer"
