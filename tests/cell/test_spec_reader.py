"""Reading many cells gives the same as reading each alone, and faults of a file are found even among known fields."""

import dataclasses
import json

import pytest

import golden_store
from ptqbench.cell.fingerprint import canonical_json, identity_fields, identity_id, identity_texts, joined
from ptqbench.errors import ConfigError
from ptqbench.results.tables import specs
from ptqbench.results.tables.specs import SpecReader
from ptqbench.runs import folder as store


@pytest.fixture
def folders(tmp_path):
    """Two methods and two seeds: every field of the fourth cell is known from the others."""
    cells = [("gptq", 0), ("rtn", 0), ("gptq", 1), ("rtn", 1)]
    return [
        store.create(golden_store.cell("m", method, "w3", seed, execution={"runs_dir": str(tmp_path)}))
        for method, seed in cells
    ]


@pytest.fixture
def warm(folders):
    """A reader that has read the first three."""
    reader = SpecReader()
    for folder in folders[:3]:
        reader.read(folder)
    return reader


def test_identity_is_that_of_the_whole(folders):
    for folder in folders:
        spec = folder.read_spec()
        assert joined(identity_texts(spec)) == canonical_json(identity_fields(spec))
        assert identity_id(identity_texts(spec)) == folder.run_id


def test_one_reader_reads_what_each_folder_says():
    reader, folders = SpecReader(), list(store.all_runs(golden_store.FOLDER))
    for folder in [*folders, *folders]:
        spec = folder.read_spec()
        assert reader.read(folder) == (spec, identity_texts(spec))


def test_a_cell_of_known_fields_is_not_validated_again(folders, warm, monkeypatch):
    monkeypatch.setattr(specs, "SPECS", None)
    spec, texts = warm.read(folders[3])
    assert (spec.method.name, spec.seed) == ("rtn", 1)
    assert texts == identity_texts(spec)
    monkeypatch.undo()
    assert spec == folders[3].read_spec()


def change(folder, **fields):
    data = json.loads(folder.spec_path.read_text())
    store.write_json(folder.spec_path, data | fields)


def damage(folder, how):
    text = folder.spec_path.read_text()
    head, seed, rest = text.partition('\n  "seed": 1,')
    assert seed
    folder.spec_path.write_text(
        {
            "truncated": text[: len(text) // 2],
            "cut at a field": head,
            "no end": text.rstrip().removesuffix("}"),
            "no comma": head + '\n  "seed": 1 ' + rest,
            "text behind": text + "x",
            "a space that JSON has not": text + "\x0b",
            "field missing": head + rest,
            "field twice": head + seed + '\n  "seed": 0,' + rest,
            "field of another cell": head + '\n  "seed": 0,' + rest,
            "unknown field": head + seed + '\n  "sed": 1,' + rest,
            "wrong type": head + '\n  "seed": "1",' + rest,
            "out of range": head + '\n  "seed": -1,' + rest,
            "not a number": text.replace('"options": {}', '"options": {"x": NaN}'),
            "not UTF-8": text,
        }[how]
    )
    if how == "not UTF-8":
        folder.spec_path.write_bytes(text.encode().replace(b'"w3"', b'"w\xff"'))


@pytest.mark.parametrize(
    "how",
    ["truncated", "cut at a field", "no end", "no comma", "text behind", "a space that JSON has not", "field missing",
     "field twice", "field of another cell", "unknown field", "wrong type", "out of range", "not a number", "not UTF-8"],
)  # fmt: skip
def test_a_damaged_or_edited_file_is_refused_with_the_words_of_the_folder(folders, warm, how):
    for folder in (folders[3], folders[2]):  # known before, and not
        damage(folder, how)
        with pytest.raises(ConfigError) as expected:
            folder.read_spec()
        with pytest.raises(ConfigError) as given:
            warm.read(folder)
        assert str(given.value) == str(expected.value)


def test_a_field_given_twice_teaches_nothing_wrong(folders, warm):
    """Of two equal keys JSON takes the last; the text of the first must not be remembered with the value of the last."""
    text = folders[0].spec_path.read_text()
    start = text.index('\n  "execution": {')
    first = text[start : text.index("\n  },", start) + len("\n  },")]
    last = first.replace('"threads": null', '"threads": 3')
    folders[0].spec_path.write_text(text.replace(first, first + last))
    assert warm.read(folders[0])[0].execution.threads == 3
    assert warm.read(folders[3])[0].execution.threads is None


@pytest.mark.parametrize("layout", [{}, {"indent": 4}, {"indent": 1}, {"separators": (",", ":")}, {"indent": 2}])
def test_any_layout_is_read(folders, warm, layout):
    data = json.loads(folders[3].spec_path.read_text())
    folders[3].spec_path.write_text(json.dumps(data, **layout))
    assert warm.read(folders[3])[0] == folders[3].read_spec()
    folders[3].spec_path.write_text(json.dumps(dict(reversed(data.items())), **layout))
    assert warm.read(folders[3])[0] == folders[3].read_spec()


def test_fields_laid_out_as_members_of_the_cell_are_not_taken_for_them(folders, warm):
    """A file may break its lines anywhere, so a member of the evaluation may be indented like a member of the cell."""
    text = folders[3].spec_path.read_text()
    start = text.index('  "evaluation": {')
    end = text.index("\n  },", start)
    inner = text[start:end].replace("\n    ", "\n  ")
    folders[3].spec_path.write_text(text[:start] + inner + text[end:])
    for reader in (warm, SpecReader()):
        assert reader.read(folders[3])[0] == folders[3].read_spec()
        assert reader.read(folders[1])[0] == folders[1].read_spec()


def test_what_does_not_change_a_number_is_read_too(folders, warm):
    change(folders[3], execution=dataclasses.asdict(folders[3].read_spec().execution) | {"threads": 3})
    assert warm.read(folders[3])[0].execution.threads == 3
    assert warm.read(folders[1])[0].execution.threads is None
