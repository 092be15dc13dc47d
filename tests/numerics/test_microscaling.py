"""Formats: golden arrays of the published codes, an independent implementation, and the laws of scales and elements."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference_formats as reference
import torch

from ptqbench.errors import ConfigError, UnsupportedError
from ptqbench.numerics import fused_columns
from ptqbench.numerics.formats import E2M1, E3M2, E4M3, FORMATS, INT8, Elements
from ptqbench.numerics.gptq import gptq
from ptqbench.numerics.grid import ColumnRange, LinearResult, effective_bits, uniform_grid
from ptqbench.numerics.grid_spec import GridSpec
from ptqbench.numerics.microscaling import block_scale, tensor_number, to_element
from ptqbench.numerics.report import relative_output_error
from ptqbench.numerics.rtn import round_to_nearest

GOLDEN_INPUT = """
0 0.25 0.75 1.25 1.75 2.5 3.5 5 -0.25 -0.75 -1.25 -1.75 -2.5 -3.5 -5 7 0.3 -0.6 0.9 -1.2 1.5 -1.8 2.1 -2.4 2.7 -3 3.3 -3.6 3.9 -4.2 4.5 -4.8
6.5 -6 5.5 -4.5 4 -3.25 3 -2.75 2.25 -2 1.6 -1.4 1.1 -0.9 0.7 -0.4 0.5 -0.45 0.4 -0.35 0.3 -0.25 0.2 -0.15 0.1 -0.05 0.025 -0.0125 0 0 0.06 -0.08
5 -2.6 1.3 -0.65 0.32 -0.16 0.08 -0.04 0.02 -0.01 4.4 -4.1 3.7 -3.1 2.9 -2.2 0.0001 -8e-05 6e-05 -5e-05 4e-05 -3e-05 2e-05 -1e-05 9e-05 -7e-05 0 5e-06 -5e-06 1e-06 2.5e-05 -4.5e-05
0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1e-06 -9e-07 8e-07 -7e-07 6e-07 -5e-07 4e-07 -3e-07 2e-07 -1e-07 5e-08 -5e-08 0 0 1e-07 -1e-07
"""  # noqa: E501
GOLDEN = """
mxfp4 floor torchao
127 127 127 105
002244668aaccee7192a3c4c5d5e6e6e
7f7e6d5d4c3b2a191919180808080008
6d391808086e6d5c0808080808008008
00000000000000006e5d5c3b29080019

mxfp4 even compressed-tensors
128 127 127 105
00112244899aacc609192a2a3b3c4c4c
7f7e6d5d4c3b2a191919180808080008
6d391808086e6d5c0808080808008008
00000000000000006e5d5c3b29080019

mxfp4 rceil torchao
128 128 127 105
00112244899aacc609192a2a3b3c4c4c
5d5c4b3b2a2919180808080808080008
6d391808086e6d5c0808080808008008
00000000000000006e5d5c3b29080019

mxfp4 ceil torchao
128 128 128 106
00112244899aacc609192a2a3b3c4c4c
5d5c4b3b2a2919180808080808080008
4b190808084c4b3a0808080808008008
00000000000000004c3b3a2918080008

mxfp4 four_thirds FP-Quant
127 127 127 105
0012345689abcde7091a2b3c4c4d5d5e
6e6d5c4c3b2a29191919080808080008
6c290808085d5c4b0808080808008008
00000000000000005d5c4b3a19080019

mxfp6 even compressed-tensors
127 127 127 105
0002060a0e12161a22262a2e32363a1e0225072a0c2e1032133415361838193a
1d3c1b391835143311300d2b0927062304240323022202210120002000000021
1a320a2503210120002019381734143100200020002000200020000020000020
000000000000000000000000000000001837153412300d2a0723022200000323

mxfp6_e3m2 floor torchao
125 125 125 103
000c121517191b1d2c323537393b3d1f0d31133516371839193a1b3b1c3c1c3d
1e3e1e3c1c3a1a3a183816361433122e102f0e2e0d2c0a290623022100000425
1d3915310d29052301211c3c1b3a1a3800200020002000200020000020000020
000000000000000000000000000000001c3c1b3a19381735132f0b2b00000f2f

mxfp8 even compressed-tensors
122 121 121 99
00505c62666a6e72d0dce2e6eaeef27652da5ee264e668ea6bec6dee70f071f2
7dfc7bf978f574f371f06deb69e663dd60de5ddb5ad855d24dc53db5000047ca
7af26ae25ad24ac23ab279f877f474f103830282018101800382000080000181
0000000000000000000000000000000078f775f472f06dea65dd55d500005ddd

mxfp8 floor torchao
121 121 121 99
0058646a6e72767ad8e4eaeef2f6fa7e5ae266ea6cee70f273f475f678f879fa
7dfc7bf978f574f371f06deb69e663dd60de5ddb5ad855d24dc53db5000047ca
7af26ae25ad24ac23ab279f877f474f103830282018101800382000080000181
0000000000000000000000000000000078f775f472f06dea65dd55d500005ddd

nvfp4 - compressed-tensors
126 122 125 96 122 3 1 1
0012345689abcde7192b4c5d5e6e6f7f
7f7e6d5d4c3b2a197f6e6d4c2918001a
7d3a1808087e6e5d7f6d5c397e01903d
00000000000000000808080808080008

one-level - torchao
57 53 57 27 53 8 8 8
0012345689abcde7192b4c5d5e6e6f7f
7f6e6d5c4c3a2a197f6e5d4b2918001a
7d3a1808087f6e6d0808080808008008
00000000000000000808080808080008

fp8 - compressed-tensors
0.015625 0.015625 0.015625 0.015625
0058646a6e72767ad8e4eaeef2f6fa7e5ae266ea6cee70f273f475f678f879fa
7dfc7bf978f574f371f06deb69e663dd60de5ddb5ad855d24dc53db5000047ca
7af26ae25ad24ac23ab279f877f474f103830282018101800382000080000181
0000000000000000000000000000000000800080008000800080008000000080

fp8_row - compressed-tensors
0.015625 0.0145089282 0.0111607146 2.23214291e-09
0058646a6e72767ad8e4eaeef2f6fa7e5ae266ea6cee70f273f475f678f879fa
7efd7cfa79f675f472f16eec69e864de61e05edc5ad956d24ec63eb6000048cb
7ef76fe75ed64ec63eb67cfb7af978f405840382028101800483000080000182
000000000000000000000000000000007efd7bfa78f673f06be35bdb000063e3

mxint8 floor microxcaling
129 129 129 107
0 4 12 20 28 40 56 80 -4 -12 -20 -28 -40 -56 -80 112 5 -10 14 -19 24 -29 34 -38 43 -48 53 -58 62 -67 72 -77
104 -96 88 -72 64 -52 48 -44 36 -32 26 -22 18 -14 11 -6 8 -7 6 -6 5 -4 3 -2 2 -1 0 0 0 0 1 -1

mxint4 floor microxcaling
129 129 129 107
0 0 1 1 2 2 4 5 0 -1 -1 -2 -2 -4 -5 7 0 -1 1 -1 2 -2 2 -2 3 -3 3 -4 4 -4 4 -5
"""
"""Format, rule, the library that made it; the scale of every block as it is stored (bytes, or the number); bit patterns by rows.

Scales of zero blocks of nvfp4 are ours (2^-9). compressed-tensors has 1/8 there; the codes are the same.
"""
SEARCHES = """
four_over_six
120 120 123 94 121 3 1 1
0012345689abcde7192a3b4c4d5d5e6e
6e5d4c4b3a2a19186e5d4c3a29080019
6c290808085d5c4b6d4c3a195d00802b
00000000000000000000000000000000

scale_sweep
120 119 118 93 121 3 1 1
0012345689abcde7192a3b4c4d5d6e6e
7f7e6d5d4c3b2a196e5d5c3b29080019
6c290808085d5c4b6d4c3a195d00802b
00000000000000000808080808080008
"""
"""Of nvfp4: mit-han-lab/fouroversix@dadfad6, and all 126 codes tried."""
CASES = [case.split("\n") for case in GOLDEN.strip().split("\n\n")]
W = torch.tensor([[float(number) for number in row.split()] for row in GOLDEN_INPUT.strip().split("\n")])
BLOCKS = {"nvfp4": 16, "fp8": None, "fp8_row": None}
F64 = torch.float64


def spec(form: str, rule: str = "even", **options: object) -> GridSpec:
    return GridSpec(FORMATS[form].elements.bits, format=form, mx_scale=rule, **options)


def rounded(weight: torch.Tensor, form: str, rule: str = "even", **options: object) -> LinearResult:
    return round_to_nearest(weight, uniform_grid(weight.shape[1], spec(form, rule, **options)))


def patterns(codes: torch.Tensor, elements: str, sign: int) -> list[list[int]]:
    """Bit patterns of codes, given as values; a negative zero does not occur."""
    index = {value: i for i, value in enumerate(reference.magnitudes(elements))}
    return [[index[abs(v)] + sign * (v < 0) for v in row] for row in codes.double().tolist()]


def without_negative_zeros(rows: list[str], digits: int, sign: int) -> list[list[int]]:
    given = [[int(row[i : i + digits], 16) for i in range(0, len(row), digits)] for row in rows]
    return [[0 if code == sign else code for code in row] for row in given]


@pytest.mark.parametrize("case", [c for c in CASES if not c[0].startswith(("one-level", "mxint"))], ids=lambda c: c[0])
def test_golden_codes_and_scales(case: list[str]) -> None:
    form, rule, _ = case[0].split()
    stored = rounded(W, form, "even" if rule == "-" else rule).stored
    digits, sign = (1, 8) if form in ("mxfp4", "nvfp4") else (2, 0x20 if form.startswith("mxfp6") else 0x80)
    assert patterns(stored.codes, reference.elements_of(form), sign) == without_negative_zeros(case[2:], digits, sign)
    assert scales(form, rule, stored.scale, stored.tensor_scale) == pytest.approx(
        [float(s) for s in case[1].split()], rel=1e-8
    )


def scales(form: str, rule: str, scale: torch.Tensor, number: torch.Tensor | None) -> list[float]:
    """Scales as checkpoints hold them: bytes of E8M0 or E4M3, or the number itself."""
    if form.startswith("fp8"):
        return scale.flatten().tolist()
    if form == "nvfp4":
        return (scale * number).flatten().to(torch.float8_e4m3fn).view(torch.uint8).tolist()
    unit = FORMATS[form].elements.unit * (4 / 3 if rule == "four_thirds" else 1)
    return [round(math.log2(s / unit)) + 127 for s in scale.double().flatten().tolist()]


@pytest.mark.parametrize("case", [c for c in CASES if c[0].startswith("mxint")], ids=lambda c: c[0])
def test_golden_integers(case: list[str]) -> None:
    form, rule, _ = case[0].split()
    stored = rounded(W, form, rule).stored
    assert stored.codes.dtype == torch.int8
    given = [[int(k) for k in row.split()] for row in case[2:]]
    assert stored.codes.tolist()[: len(given)] == given
    assert scales(form, rule, stored.scale, None) == [int(s) for s in case[1].split()]


@pytest.mark.parametrize(
    "case", [case.split("\n") for case in SEARCHES.strip().split("\n\n")], ids=lambda case: case[0]
)
def test_golden_searches(case: list[str]) -> None:
    stored = rounded(W, "nvfp4", scale_search=case[0]).stored
    assert scales("nvfp4", "", stored.scale, stored.tensor_scale) == [int(s) for s in case[1].split()]
    assert patterns(stored.codes, "e2m1", 8) == without_negative_zeros(case[2:], 1, 8)


def test_golden_one_level() -> None:
    case = next(c for c in CASES if c[0].startswith("one-level"))
    blocks = W.reshape(4, 2, 16)
    scale = block_scale(blocks.abs().amax(-1), FORMATS["nvfp4"])
    assert scale.to(torch.float8_e4m3fn).view(torch.uint8).flatten().tolist() == [int(s) for s in case[1].split()]
    codes = to_element(blocks / scale[..., None], E2M1).reshape(4, 32)
    assert patterns(codes, "e2m1", 8) == without_negative_zeros(case[2:], 1, 8)


def test_golden_tensor_number() -> None:
    assert float(tensor_number(torch.tensor(7.0), FORMATS["nvfp4"])) == float.fromhex("0x1.800002p+8")


PROBLEM_W = torch.tensor(
    [[math.sin(1.7 * (r + 1) + 0.9 * c) * (1 + r) * (3 if c == 7 else 1) for c in range(32)] for r in range(2)]
)
PROBLEM_H = torch.tensor(
    [[0.9 ** abs(i - j) * (1 + i % 5 / 4) * (1 + j % 5 / 4) for j in range(32)] for i in range(32)]
).double()
HADAMARD = torch.tensor([[(-1.0) ** (i & j).bit_count() / 4 for j in range(16)] for i in range(16)], dtype=F64)


@pytest.mark.parametrize(
    ("form", "solver", "hadamard", "error", "codes"),
    [
        ("nvfp4", {"act_order": 1}, "fpq_mse", 0.003159, ["4a91e5783bb2135da221ecf41010c254", "b331edf60129b154a8c17bfe9011cbe3"]),
        ("nvfp4", None, False, 0.039620, ["429cb83729cb8342cff9675dff8675df", "bffa676fffa676cffa676cffa675cff9"]),
        ("nvfp4", {}, False, 0.003412, ["429cb9372abb9342cff1675cff0676df", "bff9676ffec676cff9676bff9676cff8"]),
        ("nvfp4", {"act_order": True}, False, 0.003993, ["429cb93729cc8342cff9775dfe1675df", "affa675eff0676cff9676bffa775cff9"]),
        ("mxfp4", None, False, 0.009075, ["429cb83729cb8342acb8342acb8342ac", "aee9564dee9564aed9564aed9564bed9"]),
        ("mxfp4", {}, False, 0.002519, ["429cb9372abb93429cb8242acb0342ac", "aeda555ede9564aeda564aeda564aed9"]),
        ("mxfp4", {"act_order": True}, False, 0.002871, ["429cb93729cc8342acb8342acb8342ac", "aeda555ede9564aeda564bed9564aed9"]),
        ("nvfp4", {"act_order": True}, True, 0.004132, ["4a91e5783bb2135da221ecf41010c254", "b331edf60129b154a9c17afe9011ccd3"]),
    ],
)  # fmt: skip
def test_golden_solvers(form: str, solver: dict | None, hadamard: bool | str, error: float, codes: list[str]) -> None:
    """FP-Quant@d2e3092's class, and an own loop in float64: static blocks, damping .01."""
    weight, moment = PROBLEM_W.float(), PROBLEM_H
    if hadamard:
        turn = torch.block_diag(HADAMARD, HADAMARD)
        weight, moment = (weight.double() @ turn).float(), turn @ moment @ turn
    search = hadamard if isinstance(hadamard, str) else "none"
    grid = uniform_grid(32, spec(form, scale_search=search))
    result = (
        round_to_nearest(weight, grid) if solver is None else gptq(weight, moment, grid, static_groups=True, **solver)
    )
    assert patterns(result.stored.codes, "e2m1", 8) == without_negative_zeros(codes, 1, 8)
    assert relative_output_error(weight, result.dequantized, moment) == pytest.approx(error, abs=1e-6)


def random_weight(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Gaussian rows of very different size, with a zero block and single entries."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-6, 3, rows)[:, None]
    weight[1, 32:64] = 0
    weight[2, 3:40] = 0
    weight[3] *= 2.0 ** torch.randint(-12, 3, (columns,), generator=generator)
    return weight


@pytest.mark.parametrize("rule", ["even", "floor", "rceil", "ceil", "four_thirds"])
@pytest.mark.parametrize("form", FORMATS)
def test_matches_the_independent_implementation(form: str, rule: str) -> None:
    if rule != "even" and (not form.startswith("mx") or (rule == "four_thirds" and form != "mxfp4")):
        return
    weight = random_weight(6, 76, seed=1)  # the last block is short: 12 of 16 or 32
    found = rounded(weight, form, rule)
    values, _, _ = reference.quantize(weight.numpy(), form, rule)
    assert np.array_equal(found.dequantized.numpy() + 0.0, values + 0.0)
    assert torch.equal(found.stored.weight(), found.dequantized)


def edge_numbers() -> torch.Tensor:
    """Powers of two and their neighbours, up to the ends of float32."""
    powers = 2.0 ** torch.arange(-126, 128, 1, dtype=torch.float32)
    return torch.cat(
        [
            torch.nextafter(powers, torch.zeros(1)),
            powers,
            torch.nextafter(powers, torch.full((1,), 1e38)),
            1.75 * powers,
        ]
    )


@pytest.mark.parametrize("rule", ["even", "floor", "rceil", "ceil"])
@pytest.mark.parametrize("form", ["mxfp4", "mxfp6", "mxfp6_e3m2", "mxfp8", "mxint8"])
def test_exponents_next_to_powers_of_two(form: str, rule: str) -> None:
    """Where a logarithm in float32 is wrong by one."""
    peaks = edge_numbers()
    peaks = peaks[peaks.isfinite()]
    found = block_scale(peaks, FORMATS[form], rule) / FORMATS[form].elements.unit
    expected = [2.0 ** reference.e8m0(a, reference.elements_of(form), rule) for a in peaks.tolist()]
    assert found.double().tolist() == expected
    assert found.dtype == torch.float32


@pytest.mark.parametrize("elements", [E2M1, E3M2, E4M3, INT8], ids=["e2m1", "e3m2", "e4m3", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_elements_are_nearest_odd_and_idempotent(elements: Elements, dtype: torch.dtype) -> None:
    x = torch.cat(
        [torch.linspace(-1.2, 1.2, 4001, dtype=dtype) * elements.top, torch.logspace(-9, 3, 500, dtype=dtype)]
    )
    found = to_element(x, elements)
    assert torch.equal(to_element(found, elements), found)
    assert torch.equal(to_element(-x, elements), -found + 0.0)
    assert bool((found.sort().values.diff() >= 0).all())
    assert torch.equal(found[x.argsort()], found[x.argsort()].sort().values), "monotone"
    assert float(found.max()) == elements.top
    if elements is E4M3:
        inside = x.float().clamp(-448, 448)
        assert torch.equal(to_element(inside, E4M3), inside.to(torch.float8_e4m3fn).float() + 0.0)


def test_ties_go_to_even_codes() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.01, 7.0])
    assert to_element(ties, E2M1).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 6]
    assert not torch.signbit(to_element(torch.tensor([-0.1]), E2M1)).any()


@pytest.mark.parametrize("form", FORMATS)
def test_scaling_a_tensor_by_a_power_of_two_changes_no_code(form: str) -> None:
    weight = random_weight(6, 64, seed=2)
    plain, larger = rounded(weight, form).stored, rounded(weight * 64, form).stored
    live = weight.abs().amax(1) > 1e-4  # smaller rows meet the smallest scales
    assert torch.equal(larger.weight()[live], plain.weight()[live] * 64)


@pytest.mark.parametrize("rule", ["even", "floor", "rceil", "ceil"])
@pytest.mark.parametrize("form", [name for name in FORMATS if name.startswith("mx")])
def test_rounding_twice_is_rounding_once_for_powers_of_two(form: str, rule: str) -> None:
    once = rounded(random_weight(6, 64, seed=3), form, rule).dequantized
    assert torch.equal(rounded(once, form, rule).dequantized, once)


@pytest.mark.parametrize("form", FORMATS)
def test_a_block_rounds_by_itself_but_for_what_the_tensor_shares(form: str) -> None:
    weight = random_weight(6, 64, seed=4)
    smaller = weight.clone()
    smaller[5, :32] *= 0.3  # row 5 holds the largest number; keep it in the other half
    smaller[5, 40] = weight[5, 40] = weight.abs().max() * 2
    before, after = (rounded(w, form).dequantized for w in (weight, smaller))
    assert torch.equal(before[:5], after[:5])
    assert torch.equal(before[5, 32:], after[5, 32:])
    alone = rounded(weight[:3], form).dequantized
    assert torch.equal(alone, before[:3]) == (not FORMATS[form].per_tensor)


def test_zero_padding_gives_the_short_last_block() -> None:
    weight = random_weight(6, 76, seed=5)
    padded = torch.nn.functional.pad(weight, (0, 20))
    for form in FORMATS:
        assert torch.equal(rounded(weight, form).dequantized, rounded(padded, form).dequantized[:, :76]), form


def test_errors_of_the_formats_are_in_order() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    error = {form: float((rounded(weight, form).dequantized - weight).square().sum()) for form in FORMATS}
    assert error["mxint8"] < error["mxfp8"] < error["mxfp6_e3m2"] < error["nvfp4"] < error["mxfp4"] < error["mxint4"]
    assert error["mxfp6"] < error["mxfp6_e3m2"]
    assert error["fp8_row"] < error["mxfp6"]


@pytest.mark.parametrize("form", FORMATS)
def test_clip_search_never_loses(form: str) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)) ** 3
    plain, searched = (rounded(weight, form, clip_search=flag).dequantized for flag in (False, True))
    loss = [(values - weight).abs().pow(2.4).sum() for values in (plain, searched)]
    assert loss[1] <= loss[0]
    if form in ("nvfp4", "mxfp4", "fp8_row"):  # a power of two has nothing to gain where the elements are fine
        assert loss[1] < loss[0]


def squares(weight: torch.Tensor, **options: object) -> torch.Tensor:
    """Squared error of every block of nvfp4."""
    return (rounded(weight, "nvfp4", **options).dequantized - weight).square().reshape(len(weight), -1, 16).sum(-1)


def test_each_search_contains_the_scales_of_the_one_before() -> None:
    """At the same G: the largest magnitude stands in a block of its own, where no search can help."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2)) ** 3
    sweep, six = squares(weight, scale_search="scale_sweep"), squares(weight, scale_search="four_over_six")
    assert bool((sweep <= six * (1 + 1e-6)).all())
    assert float(sweep.sum()) < float(six.sum()) < float(squares(weight).sum())


def test_the_window_of_the_sweep_holds_the_best_of_all_codes() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(3))
    number = 1536 * (1 / weight.abs().max())
    numbers = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float() / number
    blocks = weight.reshape(8, 2, 1, 16)
    scale = numbers[:, None]
    best = (to_element(blocks / scale, E2M1) * scale - blocks).square().sum(-1).min(-1).values
    torch.testing.assert_close(squares(weight, scale_search="scale_sweep"), best)


@pytest.mark.parametrize("form", [name for name in FORMATS if name.startswith("mx")])
def test_the_search_for_an_exponent_never_loses(form: str) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(4)) ** 3
    for rule in ("even", "floor", "ceil"):
        loss = [
            float((rounded(weight, form, rule, scale_search=s).dequantized - weight).square().sum())
            for s in ("exponent", "none")
        ]
        assert loss[0] <= loss[1]
    assert loss[0] < loss[1], "ceil wastes a bit"


@pytest.mark.parametrize(("form", "bits", "odd"), [
    ("mxfp4", 4.25, 4 + 8 * 6 / 172), ("mxint4", 4.25, 4 + 8 * 6 / 172), ("mxfp6", 6.25, 6 + 8 * 6 / 172),
    ("mxfp8", 8.25, 8 + 8 * 6 / 172), ("nvfp4", 4.5 + 32 / (8 * 64), 4 + 8 * 11 / 172 + 32 / (8 * 172)),
    ("fp8_row", 8 + 16 / 64, 8 + 16 / 172), ("fp8", 8 + 32 / (8 * 64), 8 + 32 / (8 * 172)),
])  # fmt: skip
def test_true_bits(form: str, bits: float, odd: float) -> None:
    for columns, expected in ((64, bits), (172, odd)):
        grid = uniform_grid(columns, spec(form))
        assert effective_bits(grid, 8) == pytest.approx(expected, abs=1e-12)
        assert rounded(torch.ones(8, columns), form).stored.bits() == effective_bits(grid, 8)


@pytest.mark.parametrize("form", FORMATS)
def test_a_row_scale_that_no_scale_can_take_up_costs_sixteen_bits_per_row(form: str) -> None:
    stored, alpha = rounded(random_weight(6, 64, seed=6).double(), form).stored, torch.linspace(0.9, 1.1, 6).double()
    scaled = stored.scaled(alpha)
    torch.testing.assert_close(scaled.weight(), alpha[:, None] * stored.weight(), rtol=1e-14, atol=0)
    torch.testing.assert_close(scaled.scaled(alpha).weight(), alpha[:, None] ** 2 * stored.weight(), rtol=1e-14, atol=0)
    assert scaled.bits() - stored.bits() == pytest.approx(0 if form == "fp8_row" else 16 / 64)
    assert torch.equal(torch.cat([part.weight() for part in scaled.split_rows([2, 4])]), scaled.weight())


@pytest.mark.parametrize("form", FORMATS)
def test_gptq_under_a_round_moment_is_rounding_to_nearest(form: str) -> None:
    weight = random_weight(6, 76, seed=7)
    result = gptq(weight, 3 * torch.eye(76), uniform_grid(76, spec(form)), static_groups=True)
    assert torch.equal(result.dequantized, rounded(weight, form).dequantized)


def test_static_scales_depend_neither_on_the_moment_nor_on_the_order() -> None:
    weight, grid = random_weight(6, 64, seed=8), uniform_grid(64, spec("nvfp4"))
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(9)).double()
    x[:, :8] *= 5
    ordered = gptq(weight, x.T @ x, grid, static_groups=True, act_order=True).stored
    assert torch.equal(ordered.scale, round_to_nearest(weight, grid).stored.scale)
    assert ordered.group_index.tolist() == [j // 16 for j in range(64)]


def test_ranges_of_two_formats_have_their_own_number() -> None:
    weight = random_weight(6, 64, seed=10)
    grid = (ColumnRange(0, 48, spec("nvfp4")), ColumnRange(48, 64, spec("nvfp4")))
    result = round_to_nearest(weight, grid)
    parts = [rounded(part.contiguous(), "nvfp4").dequantized for part in weight.split([48, 16], dim=1)]
    assert torch.equal(result.dequantized, torch.cat(parts, 1))
    assert result.stored.tensor_scale.shape == (2,)
    mixed = (ColumnRange(0, 48, spec("nvfp4")), ColumnRange(48, 64, spec("mxfp8")))
    assert round_to_nearest(weight, mixed).stored.codes.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 1.5e38])
def test_the_ends_of_float32_stay_finite(form: str, size: float) -> None:
    weight = torch.full((3, 40), size)
    weight[1] = 0
    found = rounded(weight, form).dequantized
    assert torch.isfinite(found).all()
    assert not found[1].any()
    if size == 1.5e38:
        assert float((found[0] - size).abs().max()) < 0.15 * size


def test_the_scale_of_a_block_that_is_not_finite_is_nan() -> None:
    for form in FORMATS.values():
        number = tensor_number(torch.tensor(1.0), form) if form.per_tensor else None
        peaks = torch.tensor([1.0, torch.inf, torch.nan])
        assert block_scale(peaks, form, "even", number).isnan().tolist() == [False, True, True]


def test_the_column_kernel_is_for_integers() -> None:
    reason = "the kernel rounds to integer grids, got format mxfp4"
    with pytest.raises(UnsupportedError, match=reason):
        fused_columns.use_fused("fused", torch.zeros(4, 4), [spec("mxfp4")])


@pytest.mark.parametrize(("options", "words"), [
    ({"format": "mxfp5"}, "got 'mxfp5'"),
    ({"format": "mxfp4", "group_size": 64}, "mxfp4 has its own blocks, got 64"),
    ({"format": "mxfp8"}, "expected 8 for mxfp8, got 4"),
    ({"format": "nvfp4", "zero_point": "real"}, "nvfp4 is symmetric"),
    ({"format": "mxfp4", "mx_scale": "round"}, "even, floor"),
    ({"format": "mxfp4", "scale_search": "scale_sweep"}, "expected a format in nvfp4 without clip_search, got mxfp4"),
    ({"format": "nvfp4", "scale_search": "scale_sweep", "clip_search": True}, "clip_search=True"),
    ({"format": "nvfp4", "mx_scale": "four_thirds"}, "expected format mxfp4, got nvfp4"),
])  # fmt: skip
def test_impossible_grids_are_refused_in_one_line(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        GridSpec(4, **options)
    assert "\n" not in str(caught.value)
