"""Files of text: encodings, foreign formats, rows that are not text, and options that a data set does not read."""

import codecs
import gzip
import json

import pytest

from ptqbench.cell.spec import CalibrationSpec, PerplexitySpec, TextSpec
from ptqbench.data import texts
from ptqbench.data.overlap import check_disjoint
from ptqbench.data.texts import check_options, check_text, load_text, text_digest
from ptqbench.errors import CalibrationError, ConfigError

STORY = "A grey cat — très fière — sat down.\r\nThen she slept.\n"


def text_file(tmp_path, content, name="t.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_a_byte_order_mark_changes_neither_the_text_nor_its_identity(tmp_path):
    plain = TextSpec(dataset="file", path=text_file(tmp_path, STORY))
    marked = TextSpec(dataset="file", path=text_file(tmp_path, codecs.BOM_UTF8 + STORY.encode(), "marked.txt"))
    assert load_text(marked) == load_text(plain)
    assert load_text(plain).documents == (STORY.replace("\r\n", "\n"),)
    assert text_digest(marked) == text_digest(plain)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json.gz", "rows.txt"])
def test_a_byte_order_mark_does_not_become_part_of_the_first_row(tmp_path, name):
    content = codecs.BOM_UTF8 + (b"one\ntwo\n" if name.endswith("txt") else b'{"text": "one"}\n{"text": "two"}\n')
    path = text_file(tmp_path, gzip.compress(content) if name.endswith("gz") else content, name)
    assert load_text(TextSpec(dataset="c4", path=path)).documents == ("one", "two")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.txt", STORY.encode("latin-1", "replace"), "is not UTF-8.*iconv"),
        ("t.txt", STORY.encode("utf-16"), "is not UTF-8.*iconv"),
        ("t.txt", '{"text": "a story"}\n{"text": "b"}\n', "holds JSON.*dataset=c4"),
        ("t.jsonl", "not even JSON", "holds JSON"),
        ("t.txt", gzip.compress(b"a", mtime=0), "is a gzip file"),
        ("t.txt", b"PAR1abcd", "is a Parquet file"),
    ],
)
def test_what_is_no_plain_text_is_refused_by_name(tmp_path, name, content, words):
    with pytest.raises(ConfigError, match=words):
        load_text(TextSpec(dataset="file", path=text_file(tmp_path, content, name)))


@pytest.mark.parametrize("content", ["", " \n\t\n", codecs.BOM_UTF8])
def test_an_empty_file_is_refused(tmp_path, content):
    with pytest.raises(CalibrationError, match="is empty"):
        load_text(TextSpec(dataset="file", path=text_file(tmp_path, content)))


@pytest.mark.parametrize("line", ["{curly} prose", "[Applause] she bowed", "[1]"])
def test_prose_may_begin_with_a_bracket(tmp_path, line):
    assert load_text(TextSpec(dataset="file", path=text_file(tmp_path, line))).documents == (line,)


@pytest.mark.parametrize("row", [None, 7, ["a"], {"a": 1}])
def test_rows_that_are_no_text_are_named(tmp_path, row):
    path = text_file(tmp_path, '{"text": "a"}\n' + json.dumps({"text": row}) + "\n", "c4.jsonl")
    with pytest.raises(ConfigError, match=r"c4\.jsonl, row 2: expected text in 'text'"):
        load_text(TextSpec(dataset="c4", path=path))


def test_rows_of_parquet_that_are_no_text_are_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "c4.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(ConfigError, match=r"c4\.parquet, row 2: expected text in 'text', got None"):
        load_text(TextSpec(dataset="c4", path=str(path)))


@pytest.mark.parametrize("kept", [5, 30, -3])
def test_a_cut_gzip_file_is_one_line(tmp_path, kept):
    whole = gzip.compress(b"".join(b'{"text": "number %d"}\n' % i for i in range(200)))
    with pytest.raises(ConfigError, match=r"c4\.json\.gz: expected UTF-8 rows"):
        load_text(TextSpec(dataset="c4", path=text_file(tmp_path, whole[:kept], "c4.json.gz")))


def test_a_text_is_read_only_with_the_content_of_its_digest(tmp_path):
    path = text_file(tmp_path, STORY)
    spec = TextSpec(dataset="file", path=path, digest=text_digest(TextSpec(dataset="file", path=path)))
    assert load_text(spec).documents
    text_file(tmp_path, STORY + "More.")
    with pytest.raises(ConfigError, match="has changed since this cell was composed: expected the content sha256:"):
        load_text(spec)


def test_text_that_no_tokenizer_takes_in_one_piece_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MAX_CHARACTERS", 20)
    path = text_file(tmp_path, "0123456789 0123456789 0123456789")
    with pytest.raises(ConfigError, match=r"32 characters that are tokenized in one piece.*give a separator"):
        load_text(TextSpec(dataset="file", path=path))
    assert len(load_text(TextSpec(dataset="file", path=path, separator=" ")).documents) == 3
    assert len(load_text(TextSpec(dataset="file", path=path, portion=(0.0, 0.5))).documents) == 1
    with pytest.raises(ConfigError, match="in one piece"):  # rows of WikiText-2 are joined
        load_text(TextSpec(dataset="wikitext2", path=text_file(tmp_path, "0123456789\n" * 3)))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"dataset": "tiny", "path": "t.txt"}, r"calibration\.path='t\.txt' is not read.*calibration=file"),
        ({"dataset": "c4", "separator": "|"}, r"calibration\.separator='\|' is not read"),
        ({"dataset": "c4", "path": "t.txt", "revision": "main"}, r"calibration\.revision='main' is not read"),
        ({"dataset": "file", "path": "t.txt", "split": "train"}, r"calibration\.split='train' is not read"),
    ],
)
def test_options_that_nothing_reads_are_refused(spec, words):
    with pytest.raises(ConfigError, match=words):
        check_options(TextSpec(**spec), "calibration")


DOCUMENTS = ["a" * 90, "b", "c", "d", "e" * 6, "f"]


@pytest.mark.parametrize(
    ("calibration", "evaluation", "overlap"),
    [
        (
            {"separator": "|", "portion": (0.0, 0.2)},
            {"portion": (0.2, 1.0)},
            True,
        ),  # one of six documents, most characters
        ({"separator": "|", "portion": (0.0, 0.2)}, {"portion": (0.9, 1.0)}, False),
        (
            {"portion": (0.0, 0.5)},
            {"separator": "|", "portion": (0.2, 1.0)},
            False,
        ),  # half the characters, one document
        ({"portion": (0.0, 0.5)}, {"separator": "|", "portion": (0.0, 1.0)}, True),
        ({"separator": "|", "portion": (0.0, 0.5)}, {"separator": "|", "portion": (0.5, 1.0)}, False),
        ({"separator": "|", "portion": (0.0, 0.5)}, {"separator": "b", "portion": (0.5, 1.0)}, True),
        (
            {"portion": (0.0, 0.5), "split": "one"},
            {"portion": (0.0, 1.0), "split": "two"},
            True,
        ),  # a file has no splits
    ],
)
def test_overlap_is_judged_by_the_characters_of_the_content(tmp_path, calibration, evaluation, overlap):
    path = text_file(tmp_path, "|".join(DOCUMENTS))
    digest = text_digest(TextSpec(dataset="file", path=path))
    left = CalibrationSpec(dataset="file", path=path, digest=digest, **calibration)
    right = PerplexitySpec(dataset="file", path=path, digest=digest, **evaluation)
    if overlap:
        with pytest.raises(ConfigError, match=r"evaluation\.texts\.t overlaps the calibration text"):
            check_disjoint(left, right, "t")
    else:
        check_disjoint(left, right, "t")


def test_rows_and_prose_of_one_file_are_compared(tmp_path):
    path = text_file(tmp_path, "first line\nsecond line\nthird line\n")
    digest = text_digest(TextSpec(dataset="file", path=path))
    rows = CalibrationSpec(dataset="c4", split="train", path=path, digest=digest, portion=(0.0, 0.34))
    check_disjoint(rows, PerplexitySpec(dataset="file", path=path, digest=digest, portion=(0.5, 1.0)), "t")
    with pytest.raises(ConfigError, match="overlaps"):
        check_disjoint(rows, PerplexitySpec(dataset="file", path=path, digest=digest, portion=(0.2, 1.0)), "t")


@pytest.mark.parametrize("made", [CalibrationSpec, PerplexitySpec])
def test_a_text_of_fewer_bytes_than_a_window_has_tokens_is_refused(tmp_path, made):
    path = text_file(tmp_path, "Onceé")  # six bytes, a BOS token and a blank before them
    with pytest.raises(CalibrationError, match=r"t\.txt has at most 8 tokens.*seq_len=9"):
        check_text(made(dataset="file", path=path, seq_len=9))
    check_text(made(dataset="file", path=path, seq_len=8))
