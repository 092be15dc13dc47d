"""Cells in a format beside cells of integers with as many bits: never the same row, the same claim, or the same printed figure."""

import pandas as pd
import pytest

from ptqbench.results.claims import Claim, _selected
from ptqbench.results.figures import Figure, same_cell
from ptqbench.results.report_page.facts import _bitwidths
from ptqbench.results.tables import tidy
from ptqbench.results.tables.tidy import Absent
from ptqbench.sweeps.compose import compose_cell


def row(bitwidth):
    """The record of a cell that has not run."""
    spec = compose_cell(["model=tiny", "+method=gptq", f"bitwidth={bitwidth}"])
    frame = tidy([Absent.of(spec, "skipped", "a test")])
    assert len(frame) == 1
    return frame.iloc[0]


@pytest.mark.parametrize(
    ("bitwidth", "formats"),
    [("w4a4", ["int"] * 3), ("nvfp4", ["nvfp4", "nvfp4", "int"]), ("nvfp4_kvfp8", ["nvfp4", "nvfp4", "fp8"])],
)
def test_the_tidy_frame_names_formats(bitwidth, formats):
    assert list(row(bitwidth)[["w_format", "a_format", "kv_format"]]) == formats


def test_equal_bits_in_different_formats_are_different_rows():
    words = (["bitwidth=w4a4"], ["bitwidth=mxfp4"], ["bitwidth=nvfp4"], ["bitwidth=mxfp4", "bitwidth.mx_scale=floor"])
    specs = [compose_cell(["model=tiny", "+method=gptq", *more]) for more in words]
    frame = tidy([Absent.of(spec, "skipped", "a test") for spec in specs])
    assert list(frame["bitwidth"]) == ["w4a4", "mxfp4", "nvfp4", "mxfp4_floor"]


@pytest.mark.parametrize(
    ("where", "integers", "floats"),
    [
        ({"w_bits": 4, "a_bits": 16}, True, False), ({"w_bits": 4, "a_bits": 16, "w_format": "nvfp4"}, False, True),
        ({"bitwidth": "nvfp4a16"}, False, True), ({"w_bits": 4, "w_format": ["int", "nvfp4"]}, True, True),
    ],
)  # fmt: skip
def test_a_claim_about_bits_means_integers(where, integers, floats):
    claim = Claim(
        name="c",
        paper="p",
        says="s",
        first={"solver": "gptq"},
        second={"solver": "rtn"},
        metrics=["perplexity"],
        where=where,
    )
    assert [_selected(row(bits), claim, claim.first) for bits in ("w4", "nvfp4a16")] == [integers, floats]


def test_printed_figures_are_those_of_integers():
    printed = {"w_bits": 4.0, "a_bits": 16.0, "kv_bits": 16.0, "group_size": float("nan"), "note": ""}
    method = {"transform": "none", "target": "weight", "solver": "gptq", "refine": "none"}
    figure = Figure(printed, {}, method, "wikitext2/perplexity")
    assert [same_cell(dict(row(bits)), figure) for bits in ("w4", "nvfp4a16")] == [True, False]


def test_the_report_says_formats_in_words():
    frame = pd.DataFrame([row("nvfp4_kvfp8"), row("w4g32"), row("mxfp4a8")])
    assert _bitwidths(frame) == [
        "nvfp4_kvfp8: weights in NVFP4, inputs of linears in NVFP4, keys in FP8, values in FP8",
        "w4g32: weights 4 bits in groups of 32, inputs of linears, keys and values untouched",
        "mxfp4a8: weights in MXFP4, inputs of linears in MXFP8, keys and values untouched",
    ]
