"""Calibration windows from a file: formats, identity by token ids, and refused files."""

import dataclasses
import json

import numpy
import pytest
import torch
from safetensors.torch import save_file

from ptqbench.cell.spec import CalibrationSpec
from ptqbench.data.window_files import pin_windows, read_windows
from ptqbench.data.windows import calibration_windows
from ptqbench.errors import CalibrationError, ConfigError

IDS = [[1, 5, 9, 2], [3, 0, 7, 7], [8, 8, 1, 0]]
TENSOR = torch.tensor(IDS)
SAVED = {
    "tensor.pt": lambda path: torch.save(TENSOR, path),
    "int32.pth": lambda path: torch.save(TENSOR.int(), path),
    "loader.pt": lambda path: torch.save([(row[None], row[None].clone()) for row in TENSOR], path),
    "rows.pt": lambda path: torch.save(list(TENSOR), path),
    "stacked.pt": lambda path: torch.save(TENSOR[:, None], path),
    "named.pt": lambda path: torch.save({"input_ids": TENSOR, "attention_mask": TENSOR * 0 + 1}, path),
    "one.safetensors": lambda path: save_file({"samples": TENSOR}, path),
    "ids.npy": lambda path: numpy.save(path, numpy.array(IDS, dtype=">i4")),
    "ids.json": lambda path: path.write_text(json.dumps(IDS)),
}


def given(path, **more):
    return CalibrationSpec(dataset="windows", windows=str(path), **more)


@pytest.mark.parametrize("name", SAVED)
def test_every_format_gives_the_same_windows_and_identity(tmp_path, name):
    SAVED[name](tmp_path / name)
    SAVED["ids.json"](tmp_path / "reference.json")
    pinned = pin_windows(given(tmp_path / name))
    assert read_windows(pinned.windows).tolist() == IDS
    assert (pinned.n_samples, pinned.seq_len) == (3, 4)
    assert pinned.digest == pin_windows(given(tmp_path / "reference.json")).digest
    windows = calibration_windows(pinned, None, 10, seed=5)
    assert windows.dtype == torch.int64
    assert windows.tolist() == IDS


def test_other_ids_or_another_shape_are_another_identity(tmp_path):
    digests = set()
    for i, ids in enumerate([IDS, IDS[:2], [[1, 5, 9, 2, 3, 0], [7, 7, 8, 8, 1, 0]], [[1, 5, 9, 3], *IDS[1:]]]):
        (tmp_path / f"{i}.json").write_text(json.dumps(ids))
        digests.add(pin_windows(given(tmp_path / f"{i}.json")).digest)
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("w.txt", "1 2", r"expected a file named \.pt"),
        ("w.json", "[[1, 2], [3]]", "cannot be read as windows"),
        ("w.json", "[1, 2]", r"expected token ids \(windows, tokens\).*shape \(2,\)"),
        ("w.json", "[[1.5, 2.0]]", "float64"),
        ("w.json", "[[1, -2]]", "integers from 0"),
        ("w.json", "[]", "expected token ids"),
        ("w.json", "{", "cannot be read as windows"),
        ("w.npy", "no array", "cannot be read as windows"),
        ("w.pt", "no archive", "cannot be read as windows"),
        ("w.safetensors", "no tensors", "cannot be read as windows"),
    ],
)
def test_what_is_no_windows_is_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_windows(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_missing_windows_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"calibration\.windows='.*w\.pt': no such file"):
        read_windows(str(tmp_path / "w.pt"))


def test_windows_that_do_not_serve_the_model_are_refused(tmp_path):
    SAVED["ids.json"](tmp_path / "w.json")
    pinned = pin_windows(given(tmp_path / "w.json"))
    with pytest.raises(CalibrationError, match="holds token id 9, the model embeds ids below 9"):
        calibration_windows(pinned, None, 9, seed=0)
    with pytest.raises(CalibrationError, match="has 3 windows, the method takes 4"):
        calibration_windows(dataclasses.replace(pinned, n_samples=4), None, 10, seed=0)
    assert len(calibration_windows(dataclasses.replace(pinned, n_samples=2), None, 10, seed=0)) == 2
    (tmp_path / "w.json").write_text("[[1, 1, 1, 1]]")
    with pytest.raises(ConfigError, match="has changed since this cell was composed"):
        calibration_windows(pinned, None, 10, seed=0)
