"""The fused column loop against the plain one: in triton's interpreter, or on the GPU where there is one.

Sums are taken in another order, so a weight on the border between two codes may get the other one, after which its row
goes another way. The law is: the same codes but in a few rows, and nearly the same error of the layer. Where a panel is
one channel the order is the same, and so is every bit.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import INSTALLED, obstacle
from reference_problems import correlated_inputs, random_weight

from ptqbench.errors import ConfigError, NumericalError, UnsupportedError
from ptqbench.numerics import column_loop, fused_columns
from ptqbench.numerics.column_loop import LoopOptions, run_columns
from ptqbench.numerics.gptaq import gptaq
from ptqbench.numerics.gptq import gptq
from ptqbench.numerics.grid import ColumnRange, Grid, LinearResult, uniform_grid
from ptqbench.numerics.grid_spec import GridSpec
from ptqbench.numerics.group_grids import GroupGrids
from ptqbench.numerics.groups import plan_groups
from ptqbench.numerics.qronos import qronos
from ptqbench.numerics.report import relative_output_error
from ptqbench.numerics.rtn import round_to_nearest

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
OBSTACLE = obstacle()
needs_kernel = pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE)

D, ROWS = 45, 11
X = correlated_inputs(200, D, seed=0)
XQ = X + 0.2 * correlated_inputs(200, D, seed=1)
MOMENT = (XQ.T @ XQ).float().to(DEVICE)
CROSS = (XQ.T @ (X - XQ)).float().to(DEVICE)
WEIGHT = random_weight(ROWS, D, seed=2, dtype=torch.float32).to(DEVICE)
REAL = {"range_contains_zero": False, "zero_point": "real"}
KINDS: list[tuple[str, dict]] = [
    ("asym", {}), ("asym", REAL), ("asym", {"range_contains_zero": False}), ("sym_gptq", {}), ("sym_signed", {}),
]  # fmt: skip
MIXED: Grid = (
    ColumnRange(0, 13, GridSpec(2, group_size=5)),
    ColumnRange(13, 26, GridSpec(3, "sym_signed")),
    ColumnRange(26, 30, GridSpec(16)),
    ColumnRange(30, 38, GridSpec(4, group_size=4, **REAL)),
    ColumnRange(38, D, GridSpec(8, "sym_gptq")),
)
GRIDS = {
    "row": uniform_grid(D, GridSpec(4)),
    "groups": uniform_grid(D, GridSpec(3, group_size=8, clip_search=True)),
    "one column": uniform_grid(D, GridSpec(3, group_size=1)),
    "real": uniform_grid(D, GridSpec(3, group_size=20, **REAL)),
    "mixed": MIXED,
}
OPTIONS = {
    "plain": {},
    "stale": {"group_refit": "stale"},
    "act_order": {"act_order": True},
    "act_order static": {"act_order": True, "static_groups": True},
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut everything so that rows, blocks, panels and tiles leave remainders."""
    monkeypatch.setattr(column_loop, "PANEL", 7)
    monkeypatch.setattr(column_loop, "FUSED_PANEL", 12)
    monkeypatch.setattr(fused_columns, "ROWS", 8)


def assert_same(plain: LinearResult, fused: LinearResult, weight: torch.Tensor, moment: torch.Tensor) -> None:
    assert plain.stored is not None
    assert fused.stored is not None
    assert plain.stored.codes.dtype == fused.stored.codes.dtype
    assert torch.equal(plain.stored.group_index, fused.stored.group_index)
    same = (plain.stored.codes == fused.stored.codes).all(dim=1)
    assert int((~same).sum()) <= max(1, 0.02 * len(same))
    assert torch.allclose(plain.stored.scale[same], fused.stored.scale[same], rtol=1e-4, atol=0)
    assert torch.allclose(plain.dequantized[same], fused.dequantized[same], rtol=1e-4, atol=1e-5)
    errors = [relative_output_error(weight, r.dequantized, moment) for r in (plain, fused)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3 if same.all() else 0.1)
    assert not torch.signbit(fused.dequantized[fused.dequantized == 0]).any()


@needs_kernel
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("mode", OPTIONS)
@pytest.mark.parametrize("name", GRIDS)
def test_gptq_agrees_with_the_plain_loop(name: str, mode: str) -> None:
    moment, dead = MOMENT.clone(), [3, 12, 28] if name in ("groups", "mixed") else []
    moment[dead] = 0
    moment[:, dead] = 0
    plain, fused = (
        gptq(WEIGHT, moment, GRIDS[name], column_block=20, engine=engine, **OPTIONS[mode])
        for engine in ("plain", "fused")
    )
    assert_same(plain, fused, WEIGHT, moment)
    if name == "groups":
        assert (fused.dequantized[:, dead] == 0).all()


@needs_kernel
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("as_code", [False, True])
@pytest.mark.parametrize("mode", OPTIONS)
def test_drift_agrees_with_the_plain_loop(mode: str, as_code: bool) -> None:
    options = {"strength": 1.0, "column_block": 20, "as_code": as_code} | OPTIONS[mode]
    plain, fused = (gptaq(WEIGHT, MOMENT, CROSS, MIXED, engine=engine, **options) for engine in ("plain", "fused"))
    assert_same(plain, fused, WEIGHT, MOMENT)
    assert not torch.equal(fused.dequantized, gptq(WEIGHT, MOMENT, MIXED, **OPTIONS[mode]).dequantized)


@needs_kernel
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("mode", OPTIONS)
def test_qronos_agrees_with_the_plain_loop(mode: str) -> None:
    plain, fused = (
        qronos(WEIGHT, MOMENT, CROSS, MIXED, column_block=20, engine=engine, **OPTIONS[mode])
        for engine in ("plain", "fused")
    )
    assert_same(plain, fused, WEIGHT, MOMENT)


@needs_kernel
@pytest.mark.usefixtures("small")
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    bits=st.integers(2, 8),
    kind=st.sampled_from(KINDS),
    size=st.sampled_from([None, 3, 10, 16, 64]),
    block=st.integers(1, D),
    mode=st.sampled_from(sorted(OPTIONS)),
    rows=st.integers(1, 9),
    drift=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_combination_agrees_with_the_plain_loop(
    bits: int, kind: tuple, size: int | None, block: int, mode: str, rows: int, drift: bool, seed: int
) -> None:
    weight = random_weight(rows, D, seed=seed, dtype=torch.float32).to(DEVICE)
    grid = uniform_grid(D, GridSpec(bits, kind[0], group_size=size, **kind[1]))
    options = {"column_block": block} | OPTIONS[mode]
    plain, fused = (
        gptaq(weight, MOMENT, CROSS, grid, engine=engine, **options)
        if drift
        else gptq(weight, MOMENT, grid, engine=engine, **options)
        for engine in ("plain", "fused")
    )
    assert_same(plain, fused, weight, MOMENT)


@needs_kernel
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_panels_of_one_channel_give_the_same_bits(bits: int, kind: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then only rounding is left to the kernel: ties, ends, either zero, values far outside and far from zero."""
    monkeypatch.setattr(column_loop, "PANEL", 1)
    monkeypatch.setattr(column_loop, "FUSED_PANEL", 1)
    weight = WEIGHT[:8, :24].clone()
    weight[0] = (torch.arange(24, device=DEVICE) - 12) / 2  # ties wherever the scale is a power of two
    weight[1] = 0.0
    weight[2] = -0.0
    weight[3] += 3e4
    weight[4] *= 1e30
    weight[5] *= 1e-30
    weight[6] = 1e6 + torch.arange(24, device=DEVICE) / 16
    grid = uniform_grid(24, GridSpec(bits, kind[0], **kind[1]))
    moment = MOMENT[:24, :24].contiguous()
    plain, fused = (gptq(weight, moment, grid, engine=engine) for engine in ("plain", "fused"))
    assert torch.equal(plain.stored.codes, fused.stored.codes)
    assert torch.equal(plain.dequantized.view(torch.int32), fused.dequantized.view(torch.int32))


@needs_kernel
@pytest.mark.parametrize("name", GRIDS)
def test_a_diagonal_moment_gives_rounding_to_nearest(name: str) -> None:
    rounded = round_to_nearest(WEIGHT, GRIDS[name])
    for c in (1.0, 7e-5):
        result = gptq(WEIGHT, c * torch.eye(D, device=DEVICE), GRIDS[name], engine="fused")
        assert torch.equal(result.stored.codes, rounded.stored.codes)
        assert torch.equal(result.dequantized, rounded.dequantized)


@needs_kernel
def test_rows_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_columns, "ROWS", 8)
    rows = [0, 5, 9, 10]
    whole, part = (gptq(w, MOMENT, GRIDS["row"], engine="fused") for w in (WEIGHT, WEIGHT[rows]))
    assert torch.equal(whole.stored.codes[rows], part.stored.codes)
    assert torch.equal(whole.dequantized[rows], part.dequantized)


@needs_kernel
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_a_number_that_is_none_stays_visible_and_in_its_row() -> None:
    """Limits must not turn NaN into a code: the check of the result would miss it."""
    grids = GroupGrids(plan_groups(GRIDS["row"], WEIGHT), [torch.arange(D)], WEIGHT.T)
    grids.fit(0, WEIGHT)
    work = WEIGHT.T.clone(memory_format=torch.contiguous_format)
    work[5, 3], work[9, 6] = torch.nan, torch.inf
    upper = torch.linalg.cholesky(MOMENT).T.contiguous()
    _, values, _ = run_columns(work, upper, grids, LoopOptions(), None, torch.uint8, "fused")
    bad = (~torch.isfinite(values)).any(dim=0)
    assert bad[3]
    assert not bad[[r for r in range(ROWS) if r not in (3, 6)]].any()
    huge = WEIGHT.clone()
    huge[2, ::2], huge[2, 1::2] = 3e38, -3e38
    for engine in ("plain", "fused"):
        with pytest.raises(NumericalError, match="dequantized"):
            gptq(huge, MOMENT, GRIDS["row"], engine=engine)


@pytest.mark.skipif(not INSTALLED, reason="needs triton")
def test_compiles_to_exact_arithmetic_without_a_gpu(tmp_path: Path) -> None:
    program = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ptqbench.numerics import fused_columns as f
from ptqbench.numerics.column_kernel import round_panel
types = {"codes": "*u8", "group": "*i32", "kind": "*i32", "rows": "i32", "length": "i32"}
for drift in (False, True):
    constants = {"CHANNELS": f.PANEL, "ROWS": f.ROWS, "DRIFT": drift}
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in round_panel.arg_names}
    source = ASTSource(round_panel, signature, constants)
    print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=f.LAUNCH).asm["ptx"])
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(re.findall(r"div\.rn\.(?:ftz\.)?f32", done.stdout)) == 2  # not the approximate division
    assert not re.search(r"\bfma\.|\b(min|max)\.\S*f32", done.stdout)  # those would drop NaN


def test_engines_are_chosen_by_what_they_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    work = torch.zeros(4, 3)
    assert not fused_columns.use_fused("auto", work)
    assert not fused_columns.use_fused("plain", work)
    with pytest.raises(ConfigError, match="engine: expected one of auto, plain, fused"):
        fused_columns.use_fused("fast", work)
    assert fused_columns.engine_on(torch.device("cpu")) == "plain"
    monkeypatch.setattr(fused_columns, "_has_triton", lambda: True)
    monkeypatch.setattr(fused_columns, "_kernels", lambda: SimpleNamespace(INTERPRETED=False, VERSION="9.9"))
    assert fused_columns.engine_on(torch.device("cuda", 1)) == "fused, triton 9.9"
    with pytest.raises(UnsupportedError, match="float64"):
        fused_columns.use_fused("fused", work.double())
    with pytest.raises(UnsupportedError, match="CUDA device"):
        fused_columns.use_fused("fused", work)
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32, is_contiguous=lambda: True)
    assert fused_columns.use_fused("auto", on_gpu)
    fused_columns.forbid_fused()
    try:
        assert not fused_columns.use_fused("auto", on_gpu)
        assert fused_columns.engine_on(torch.device("cuda", 1)) == "plain"
    finally:
        fused_columns.forbid_fused(False)
    assert fused_columns.use_fused("auto", on_gpu)
    monkeypatch.setattr(fused_columns, "_has_triton", lambda: False)
    assert not fused_columns.use_fused("auto", on_gpu)
    assert fused_columns.engine_on(torch.device("cuda")) == "plain"
    with pytest.raises(UnsupportedError, match="not installed"):
        fused_columns.use_fused("fused", on_gpu)


def test_a_kernel_that_does_not_compile_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getitem__(self, grid: tuple) -> None:
            raise RuntimeError("ptxas: no such architecture\nmore")

    monkeypatch.setattr(fused_columns, "_has_triton", lambda: True)
    monkeypatch.setattr(fused_columns, "_kernels", lambda: SimpleNamespace(round_panel=Broken(), INTERPRETED=True))
    with pytest.raises(UnsupportedError, match=r"no such architecture; use execution.column_loop=plain"):
        gptq(WEIGHT, MOMENT, GRIDS["row"], engine="fused")


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("size", [None, 128])
def test_auto_is_fused_on_a_gpu_and_agrees_at_real_sizes(size: int | None) -> None:
    x = correlated_inputs(2048, 512, seed=3).float().to(DEVICE)
    weight, grid = (
        random_weight(300, 512, seed=4, dtype=torch.float32).to(DEVICE),
        uniform_grid(512, GridSpec(4, group_size=size)),
    )
    plain, fused, auto = (gptq(weight, x.T @ x, grid, engine=engine) for engine in ("plain", "fused", "auto"))
    assert_same(plain, fused, weight, x.T @ x)
    assert torch.equal(auto.dequantized, fused.dequantized)
