"""Whatever labels and values a table has and however narrow the terminal is, no number is broken."""

import io
import random

import pytest
from rich.cells import cell_len
from rich.console import Console

import golden_store
from ptqbench.results import tables
from ptqbench.results.layout import fitted, folded, without_common
from ptqbench.results.tables import Column, Entry, Sheet
from ptqbench.results.terminal import print_sheets, result_line, result_table
from ptqbench.runs import folder as store

LABELS = [
    "gptq",
    "gptq damping=0.001 act_order=true",
    "tiny",
    "w4a4kv4",
    "a_long_name_without_any_space_in_it",
    "日本語の名前",
    "[/x] [low]",
]


def printed(sheet, width, ascii_only=False):
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(fitted(sheet, width, ascii_only))
    return console.file.getvalue()


def some_sheet(random):
    n_labels, n_numbers = random.randint(1, 4), random.randint(1, 9)
    columns = [Column(random.choice(["model", "method", "bitwidth"]), numeric=False) for _ in range(n_labels)]
    columns += [
        Column(random.choice(["acc ↑", "perplexity ↓"]), random.choice(["", "wikitext2", "some_very_long_task"]))
        for _ in range(n_numbers)
    ]
    columns += [Column("verdict", numeric=False)] * random.randint(0, 1)

    def text(column):
        return f"{10 ** random.uniform(0, 5):.3f} ± {random.random():.3f}" if column.numeric else random.choice(LABELS)

    rows = [
        [Entry(text(column), random.random() < 0.2, random.choice([None, 1])) for column in columns]
        for _ in range(random.randint(1, 6))
    ]
    return Sheet(columns, rows, sections=[1] if len(rows) > 1 else [], title=random.choice(["", "A title [/b]"]))


@pytest.mark.parametrize("seed", range(40))
def test_every_number_stands_whole_on_one_line_and_nothing_is_left_out(seed):
    draw = random.Random(seed)
    sheet, width = some_sheet(draw), draw.choice([24, 40, 60, 80, 100, 160])
    text = printed(sheet, width)
    lines = text.splitlines()
    for row in sheet.rows:
        for column, entry in zip(sheet.columns, row, strict=True):
            if column.numeric:
                value = entry.text.replace(" ± ", "±") + ("" if entry.note is None else f" [{entry.note}]")
                assert any(value in line for line in lines), (value, width)
    assert max(map(cell_len, lines)) <= width


@pytest.mark.parametrize("width", [60, 80, 100, 160])
@pytest.mark.parametrize("columns", [["metric"], ["model", "metric"]])
def test_a_papers_table_fits(width, columns):
    frame = tables.tidy((folder, None) for folder in store.all_runs(golden_store.FOLDER))
    sheet = tables.comparison_sheet(frame, "Paper", columns, brief=True)
    lines = printed(sheet, width).splitlines()
    assert max(map(len, lines)) <= width
    assert sum("73.20±0.29" in line for line in lines) == 1


def test_what_all_rows_share_moves_into_the_title():
    sheet = Sheet(
        [Column("model", numeric=False), Column("method", numeric=False), Column("x")],
        [[Entry("m"), Entry(name), Entry("1")] for name in "ab"],
    )
    kept, common = without_common(sheet, ("model", "method"))
    assert [column.name for column in kept.columns] == ["method", "x"]
    assert common == ["model: m"]


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("coquant n_samples=128", 14, ["coquant", "n_samples=128"]),
        ("coquant n_samples=128", 12, ["coquant", "n_samples=", "128"]),
        ("gptq rotation_seed=0.125", 14, ["gptq", "rotation_seed=", "0.125"]),
        ("gptq rotation_seed=0.125", 12, ["gptq", "rotation_", "seed=0.125"]),
        ("wikitext2/perplexity", 12, ["wikitext2/", "perplexity"]),
        ("a_b", 3, ["a_b"]),
    ],
)
def test_labels_are_folded_where_words_end_and_inside_a_name_only_where_it_is_too_long(text, width, lines):
    assert folded(text, width) == lines


def test_a_word_without_any_break_is_cut():
    assert "".join(folded("x" * 30, 7)) == "x" * 30


def test_a_terminal_that_knows_only_ascii_gets_ascii(monkeypatch, capsys):
    sheet = Sheet(
        [Column("é", numeric=False), Column("acc ↑")], [[Entry("日本"), Entry("1.5 ± 0.1")]], remarks=["±: spread"]
    )
    assert "1.5~0.1" in printed(sheet, 40, ascii_only=True)
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    print_sheets([sheet], "terminal")
    import sys

    sys.stdout.flush()
    assert b"1.5~0.1" in raw.getvalue()


def test_brackets_are_text():
    sheet = Sheet([Column("[/x]", numeric=False), Column("[red]")], [[Entry("[low] a"), Entry("1")]], title="a [/b]")
    text = printed(sheet, 80)
    assert all(word in text for word in ("[/x]", "[red]", "[low] a", "a [/b]"))


@pytest.mark.parametrize("lacking", ["bits", "metrics", "timings"])
def test_a_finished_result_that_lacks_a_part_is_shown(lacking):
    result = {
        "metrics": {"[/x]/perplexity": {"value": None, "mean_loss": 800.0}},
        "bits": {"effective_w_bits": 4.0},
        "timings": {"a": 1.0},
    }
    del result[lacking]
    console = Console(width=80, file=io.StringIO())
    console.print(result_table("a [/b]", result))
    assert "a [/b]" in console.file.getvalue()
    if lacking != "timings":
        assert f"result.json lacks {lacking}" in result_line(result)
    if lacking != "metrics":
        assert "[/x]/perplexity inf" in result_line(result)


@pytest.mark.parametrize("wrong", [7, "x", [1], None, {}, {"value": "x"}, {"value": 1e300, "stderr": "x"}])
def test_a_result_with_fields_of_another_type_is_shown(wrong):
    parts = {"packed_bytes": wrong, "effective_w_bits": wrong, "nominal_w_bits": 4}
    damaged = {"metrics": {"a/acc": wrong, "b/acc": {"value": 0.5}}, "bits": parts, "timings": {"a": 1.5, "b": wrong}}
    assert "b/acc 50.0" in result_line(damaged)
    console = Console(file=io.StringIO(), width=100)
    console.print(result_table("cell", damaged))
    said = console.file.getvalue()
    assert "50.0" in said
    assert "4.000" in said
