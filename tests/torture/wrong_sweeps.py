"""Sweep files that make no sense, and some that only look odd."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from random import Random

from torture.requests import Place, Request

SOUND = """\
name: sound
title: A sound sweep
common: [model=tiny, calibration.n_samples=8]
grids:
  - {method: [rtn, gptq], bitwidth: [w4, w3]}
  - zip: {method: [q2n, loaq], bitwidth: [w2, w3]}
exclude: [{method: gptq, bitwidth: w4, reason: "not this one"}]
expect_cells: 5
"""
GRID = "  - {method: [rtn, gptq], bitwidth: [w4, w3]}"
ZIP = "  - zip: {method: [q2n, loaq], bitwidth: [w2, w3]}"
EXCLUDE = 'exclude: [{method: gptq, bitwidth: w4, reason: "not this one"}]'
CHANGES: dict[str, tuple[str, str]] = {  # what is wrong: (old text, new text)
    "expect_cells does not fit": ("expect_cells: 5", "expect_cells: 6"),
    "expect_cells is a word": ("expect_cells: 5", "expect_cells: five"),
    "expect_cells is negative": ("expect_cells: 5", "expect_cells: -5"),
    "unknown key": ("title:", "titel:"),
    "unknown key beside": ("name: sound", "name: sound\nnosuch: 1"),
    "no name": ("name: sound\n", ""),
    "name is a list": ("name: sound", "name: [a, b]"),
    "name is null": ("name: sound", "name: null"),
    "title is a mapping": ("title: A sound sweep", "title: {a: 1}"),
    "common is a word": ("common: [model=tiny, calibration.n_samples=8]", "common: model=tiny"),
    "common holds a mapping": ("common: [model=tiny,", "common: [{model: tiny},"),
    "common holds a number": ("common: [model=tiny,", "common: [7,"),
    "grids is a mapping": (GRID + "\n" + ZIP, "  {method: rtn}"),
    "grids is a word": ("grids:\n" + GRID + "\n" + ZIP, "grids: rtn"),
    "grids is empty": ("grids:\n" + GRID + "\n" + ZIP, "grids: []"),
    "a grid is null": (GRID, "  - null"),
    "a grid is a list": (GRID, "  - [rtn, gptq]"),
    "a grid is empty": (GRID, "  - {}"),
    "an axis is empty": ("bitwidth: [w4, w3]}", "bitwidth: []}"),
    "an axis is null": ("bitwidth: [w4, w3]}", "bitwidth: null}"),
    "an axis holds a mapping": ("bitwidth: [w4, w3]}", "bitwidth: [{w: 4}]}"),
    "an axis is a number": ("bitwidth: [w4, w3]}", "7: [w4, w3]}"),
    "a misspelled axis": ("bitwidth: [w4, w3]}", "bitwidht: [w4, w3]}"),
    "a misspelled value": (GRID, "  - {method: [rtnn, gptq], bitwidth: [w4, w3]}"),
    "zip of two lengths": ("bitwidth: [w2, w3]}", "bitwidth: [w2]}"),
    "zip in zip": (ZIP, "  - zip: {zip: {method: [q2n, loaq]}}"),
    "zip beside an axis": (ZIP, ZIP + "\n    seed: [0, 1]"),
    "zip of words": (ZIP, "  - zip: method"),
    "zip is empty": (ZIP, "  - zip: {}"),
    "zip of empty lists": (ZIP, "  - zip: {method: [], bitwidth: []}"),
    "an exclusion that matches nothing": ("method: gptq, bitwidth: w4", "method: gptqq, bitwidth: w4"),
    "an exclusion of an unknown axis": ("method: gptq, bitwidth: w4", "methd: gptq"),
    "an exclusion without conditions": ("method: gptq, bitwidth: w4, ", ""),
    "an exclusion is a word": (EXCLUDE, "exclude: [gptq]"),
    "everything is excluded": ("method: gptq, bitwidth: w4", "method: [rtn, gptq, q2n, loaq]"),
    "a key twice": ("expect_cells: 5", "grids: [{method: rtn, bitwidth: w4}]"),
    "an axis twice": ("bitwidth: [w4, w3]}", "bitwidth: [w4, w3], bitwidth: [w2]}"),
    "rows that do not exist": ("name: sound", "name: sound\nrows: [nosuch]"),
    "columns that do not exist": ("name: sound", "name: sound\ncolumns: [nosuch, metric]"),
    "a tab": ("common:", "\tcommon:"),
    "a bracket left open": ("[w4, w3]}", "[w4, w3}"),
    "a tag of Python": ("name: sound", "name: !!python/object/apply:os.getcwd []"),
    "an anchor that is not there": ("name: sound", "name: *nosuch"),
    "a date as a value": ("bitwidth: [w4, w3]}", "bitwidth: [2026-01-01]}"),
    "nan as a value": ("bitwidth: [w4, w3]}", "bitwidth: [w4], seed: [.nan]}"),
    "null as a value": ("bitwidth: [w4, w3]}", "bitwidth: [w4], seed: [null]}"),
    "a word as the seed": ("bitwidth: [w4, w3]}", "bitwidth: [w4], seed: [one]}"),
    "markup as the seed": ("bitwidth: [w4, w3]}", "bitwidth: [w4], seed: ['[/x]']}"),
    "a bit width as a number": ("bitwidth: [w4, w3]}", "bitwidth: [4]}"),
    "a comma in a common word": ("calibration.n_samples=8", "'seed=1,2'"),
    "a grammar slip in a common word": ("calibration.n_samples=8", "'seed=['"),
}
COUNTED = {"expect_cells does not fit", "expect_cells is a word", "expect_cells is negative"}
MANY = (
    "common: [model=tiny]\ngrids: [{" + ", ".join(f"a{i}: {list(range(30))}" for i in range(8)) + "}]"
)  # 30 ** 8 cells
ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in itertools.pairwise("abcdefgh")
)
WHOLE: dict[str, Callable[[], str | bytes]] = {
    "empty": lambda: "",
    "a number": lambda: "7",
    "a list": lambda: "[1, 2]",
    "a word": lambda: "sweep",
    "two documents": lambda: SOUND + "---\n" + SOUND,
    "not UTF-8": lambda: SOUND.encode().replace(b"sound", b"s\xff\xfeund"),
    "UTF-16": lambda: SOUND.encode("utf-16"),
    "binary": lambda: bytes(range(256)) * 8,
    "zeros": lambda: b"\0" * 400,
    "nested deep": lambda: "name: x\ngrids: " + "[" * 3000 + "]" * 3000,
    "nested deep in a value": lambda: "name: x\ngrids: [{method: rtn, seed: " + "[" * 900 + "]" * 900 + "}]",
    "too many cells": lambda: "name: x\nexpect_cells: 2\n" + MANY,
    "too many cells, not counted": lambda: "name: x\n" + MANY,
    "aliases of aliases": lambda: ALIASES + "name: x\ngrids: [*h]\n",
    "an alias of itself": lambda: "name: x\ngrids: &g [*g]\n",
    "JSON cut off": lambda: '{"name": "x", "grids": [{"method": "rt',
}  # fmt: skip
ODD: dict[str, tuple[str, str]] = {  # sound, whatever it looks like
    "markup in the title": ("title: A sound sweep", "title: 'a [/b] [red] [low]'"),
    "non-ASCII title": ("title: A sound sweep", "title: Größe ∑ 量子化"),
    "title of many letters": ("title: A sound sweep", f"title: {'long ' * 200}"),
    "markup in a reason": ("not this one", "[/x] not this one"),
    "one value instead of a list": ("expect_cells: 5\n", ""),
}


def sweep_file(draw: Random, place: Place) -> Request:
    """A sweep file and a command that reads it."""
    kind = draw.random()
    (place.here / "new").mkdir()  # else that would be what is refused
    command = draw.choice(("plan", "plan", "status", "table", "report", "sweep", "retry", "cancel", "prefetch"))
    if kind < 0.1:
        title, (old, new) = draw.choice(list(ODD.items()))
        path = place.write("odd.yaml", SOUND.replace(old, new))
        reader = draw.choice(("plan", "status", "table", "report", "cancel"))
        return Request(f"sound sweep: {title}", [reader, str(path), "--runs-dir", str(place.here / "new")], status=(0,))
    if kind < 0.3:
        title = draw.choice(list(WHOLE))
        path = place.write("whole.yaml", WHOLE[title]())
    elif kind < 0.35:
        title, path = "a folder", place.here / "folder.yaml"
        path.mkdir()
    else:
        title = draw.choice(list(CHANGES))
        old, new = CHANGES[title]
        assert old in SOUND, title
        text = SOUND.replace(old, new)
        path = place.write("changed.yaml", text if title in COUNTED else text.replace("expect_cells: 5\n", ""))
    words = [command, str(path), "--runs-dir", str(place.here / "new")]
    if command in ("sweep", "retry"):
        words.append("launcher=print")
    lenient = title in CELLS_ONLY
    if not lenient:
        return Request(f"sweep file: {title}", words, says=(path.name, "sound"))
    if command not in ("plan", "sweep"):
        words[0] = "plan"
    return Request(f"sweep file: {title}", words, status=(0, 1, 2), says=("invalid", "ptqbench: "), one_line=False)


CELLS_ONLY = {  # some cells are wrong, the file is not: the others may be shown
    "a misspelled axis", "a misspelled value", "an axis is a number", "a word as the seed", "markup as the seed", "null as a value",
    "nan as a value", "a bit width as a number", "a date as a value", "an axis is null", "a grammar slip in a common word",
    "a comma in a common word", "an axis holds a mapping",
}  # fmt: skip
