"""Texts and windows."""

import pytest
import torch

from ptqbench.cell.spec import CalibrationSpec, PerplexitySpec, TextSpec
from ptqbench.data import texts, windows
from ptqbench.data.overlap import check_disjoint
from ptqbench.errors import CalibrationError, ConfigError


class CharacterTokenizer:
    """A stand-in for a tokenizer: one token per character."""

    def __init__(self, bos=None):
        self.bos_token_id = bos

    def __call__(self, text, add_special_tokens=True, verbose=True):
        encode = lambda t: (
            ([self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []) + [ord(c) for c in t]
        )
        return type("Encoding", (), {"input_ids": encode(text) if isinstance(text, str) else [encode(t) for t in text]})


@pytest.fixture
def story_file(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("alpha|beta\n|gamma|delta|epsilon")
    return str(path)


def file_spec(path, cls=TextSpec, **more):
    return cls(dataset="file", path=path, **more)


def test_documents_are_separated_and_stripped(story_file):
    assert texts.load_text(file_spec(story_file, separator="|")).documents == (
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
    )


def test_portions_partition_the_documents(story_file):
    parts = [
        texts.load_text(file_spec(story_file, separator="|", portion=p)).documents
        for p in [(0.0, 0.4), (0.4, 0.8), (0.8, 1.0)]
    ]
    assert [len(p) for p in parts] == [2, 2, 1]
    assert sum(parts, ()) == texts.load_text(file_spec(story_file, separator="|")).documents


def test_without_separator_the_portion_counts_characters(tmp_path):
    (tmp_path / "t.txt").write_text("0123456789")
    assert texts.load_text(file_spec(str(tmp_path / "t.txt"), portion=(0.3, 0.8))).documents == ("34567",)


def test_evaluation_windows_cover_every_document_in_order(story_file):
    spec = file_spec(story_file, PerplexitySpec, separator="|", seq_len=4)
    tokens = []
    for word in ("alpha", "beta", "gamma", "delta", "epsilon"):
        tokens += [7, *map(ord, word)]
    found = windows.evaluation_windows(spec, CharacterTokenizer(bos=7), 200)
    assert found.dtype == torch.int64
    assert found.flatten().tolist() == tokens[: len(tokens) // 4 * 4]


def test_joined_text_is_tokenized_once():
    text = texts.Text(("ab", "cd"), "\n\n")
    assert list(windows.tokenize(text, CharacterTokenizer(bos=7), 200)) == [[7, *map(ord, "ab\n\ncd")]]


def test_calibration_windows_are_seeded_slices(story_file):
    spec = file_spec(story_file, CalibrationSpec, separator="|", seq_len=5, n_samples=40)
    draw = lambda seed: windows.calibration_windows(spec, CharacterTokenizer(), 200, seed)
    row = "alphabetagammadeltaepsilon"
    assert draw(0).shape == (40, 5)
    found = {"".join(map(chr, w)) for w in draw(0).tolist()}
    assert all(w in row for w in found)
    assert len(found) > 10
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_golden_calibration_draw(story_file):
    """Pins the sampler: another Python version must draw the same windows."""
    spec = file_spec(story_file, CalibrationSpec, separator="|", seq_len=5, n_samples=4)
    drawn = ["".join(map(chr, w)) for w in windows.calibration_windows(spec, CharacterTokenizer(), 200, 0).tolist()]
    assert drawn == ["mmade", "epsil", "betag", "epsil"]


def test_document_random_crops_stay_inside_long_documents(story_file):
    spec = file_spec(story_file, CalibrationSpec, separator="|", seq_len=5, n_samples=20, sampling="document_random")
    drawn = {"".join(map(chr, w)) for w in windows.calibration_windows(spec, CharacterTokenizer(), 200, 3).tolist()}
    assert drawn == {
        "epsil",
        "psilo",
    }  # only "epsilon" is longer than 5, and starts are 0 and 1 (strictly more than seq_len)


@pytest.mark.parametrize("sampling", ["joined_random", "document_random"])
def test_too_short_calibration_text(story_file, sampling):
    spec = file_spec(story_file, CalibrationSpec, separator="|", seq_len=400, sampling=sampling)
    with pytest.raises(CalibrationError, match="400"):
        windows.calibration_windows(spec, CharacterTokenizer(), 200, 0)


def test_too_short_evaluation_text_says_how_long_it_is(story_file):
    with pytest.raises(CalibrationError, match=r"has 26 tokens, fewer than one window of seq_len=100"):
        windows.evaluation_windows(
            file_spec(story_file, PerplexitySpec, separator="|", seq_len=100), CharacterTokenizer(), 200
        )


def test_foreign_tokenizer_is_detected(story_file):
    with pytest.raises(CalibrationError, match="does not match the model"):
        windows.evaluation_windows(file_spec(story_file, PerplexitySpec, seq_len=4), CharacterTokenizer(), 90)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (TextSpec(dataset="wikitxt2"), "did you mean 'wikitext2'"),
        (TextSpec(dataset="tiny", split="calibratoin"), "did you mean 'calibration'"),
        (TextSpec(dataset="file"), "needs a path"),
        (TextSpec(dataset="file", path="no/such.txt"), "does not exist"),
        (TextSpec(dataset="c4", split="test"), "no split 'test'"),
    ],
)
def test_bad_texts(spec, words):
    with pytest.raises(ConfigError, match=words):
        texts.load_text(spec)


def test_hub_text_without_network_says_what_to_do():
    with pytest.raises(ConfigError, match=r"Salesforce/wikitext.*neither cached nor reachable.*calibration=file"):
        texts.load_text(TextSpec(dataset="wikitext2", split="test"))


def test_overlap_of_calibration_and_evaluation_is_refused(story_file):
    calibration = file_spec(story_file, portion=(0.0, 0.8), digest="d")
    check_disjoint(calibration, file_spec(story_file, portion=(0.8, 1.0), digest="d"), "file")
    check_disjoint(calibration, file_spec(story_file, digest="other"), "file")
    with pytest.raises(ConfigError, match="overlaps the calibration text"):
        check_disjoint(calibration, file_spec(story_file, portion=(0.7, 1.0), digest="d"), "file")
