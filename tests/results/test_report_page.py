"""The report page is well-formed, complete and self-contained, and says what the table says."""

import base64
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from fidelity_cells import fidelity_cell

import golden_store
from ptqbench.cli import main
from ptqbench.results import analysis, tables
from ptqbench.results.report_page import facts, plots, report_page
from ptqbench.results.report_page.plots import _shifts, _within_reach
from ptqbench.runs import folder as store
from ptqbench.runs import provenance

VOID = {"meta", "img", "br", "hr", "link"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Page(HTMLParser):
    """Elements with their attributes, the tables as text, and a complaint where elements are not nested."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.tables, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            bold, note = ("*" if "b" in self.open else ""), ("^" if "sup" in self.open else "")
            self.tables[-1][-1][-1] += bold + note + data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    def words(self):
        return " ".join(self.text.split())


EXCLUDED = tables.Absent("toy-1b", "qep", "w3", 0, "excluded", "too dear")


def sources_of(root, *others):
    return [*((folder, None) for folder in store.all_runs(root)), *others]


def give_provenance(root, **changes):
    """What a run writes into every attempt, with a commit of our own."""
    meta = provenance.collect() | {"git": {"commit": COMMIT}} | changes
    for number, folder in enumerate(store.all_runs(root)):
        if folder.result() is not None:
            attempt = folder.new_attempt()
            store.write_json(attempt / "meta.json", {"pid": number} | {k: v for k, v in meta.items() if k != "pid"})
            store.write_json(attempt / "heartbeat.json", {"time": 1.8e9, "ended": "done"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The golden store; of the second model the unquantized cell alone."""
    root = tmp_path_factory.mktemp("runs")
    golden_store.write(root)
    for path in root.glob("toy_3b-*"):
        if "fp16" not in path.name:
            shutil.rmtree(path)
    golden_store.write_reports(root)
    give_provenance(root)
    return root


@pytest.fixture(scope="module")
def text(runs):
    return report_page(sources_of(runs, EXCLUDED), "Invented <figures> & more")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


@pytest.fixture
def two(tmp_path):
    """Two finished cells and an unquantized one, in a folder of the test."""
    for method, bitwidth, bits, perplexity in (
        ("fp16", "fp16", 16, 6.0),
        ("rtn", "w3", 3, 9.0),
        ("gptq", "w3", 3, 7.0),
    ):
        spec = golden_store.cell("m", method, bitwidth, 0, execution={"runs_dir": str(tmp_path)})
        folder = store.create(spec)
        store.write_json(folder.result_path, golden_store.result(spec, folder, bits, perplexity, 0.5))
    return tmp_path


def test_page_is_well_formed_and_accessible(page, text):
    assert text.startswith("<!doctype html>")
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == len(page.all("title")) == 1
    assert "Invented <figures> & more" in page.text
    assert "Invented &lt;figures&gt; &amp; more" in text
    assert {th["scope"] for th in page.all("th")} == {"col", "colgroup"}
    assert all(len(image["alt"]) > 40 for image in page.all("img"))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_page_refers_to_nothing_outside_itself(page, text):
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.elements}
    addresses = [
        value for _, attrs in page.elements for name, value in attrs.items() if name in ("src", "href", "srcset")
    ]
    assert len(addresses) == len(page.all("img")) == 5
    assert all(address.startswith("data:image/svg+xml;base64,") for address in addresses)
    without = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search(r"https?:|//\w|url\(|@import", without)
    for address in addresses:
        svg = base64.b64decode(address.partition(",")[2]).decode()
        assert "<script" not in svg
        assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', svg))
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", svg))
        assert set(re.findall(r'(\S+)="https?:', svg)) <= {"xmlns", "xmlns:xlink"}, "names, not addresses"


def test_every_number_is_that_of_the_table(page, runs):
    sheet = tables.comparison_sheet(tables.tidy(sources_of(runs, EXCLUDED)))
    expected = [
        [("*" if e.bold else "") + e.text + (f"^{e.note}" if e.note is not None else "") for e in row]
        for row in sheet.rows
    ]
    assert page.tables[1][2:] == expected
    assert any("*" in entry for row in expected for entry in row)
    assert any("^" in entry for row in expected for entry in row)
    assert all(words in page.words() for words in [*sheet.notes, *sheet.remarks])


def test_missing_cells_are_named_with_their_reason(page):
    assert "18 of 21 cells are done; 1 excluded; 1 failed; 1 pending." in page.words()
    assert "failed: block 3: o_proj: NaN in weight" in page.words()
    assert "seed 2 pending" in page.words()
    assert "excluded: too dear" in page.words()


def test_what_was_measured_is_said(page):
    words = page.words()
    assert "8 quantization methods on toy-1b (800 million weights in its linears) and toy-3b" in words
    assert (
        "with seeds 0, 1 and 2, compared by perplexity on wikitext2 and accuracy on arc_easy and winogrande." in words
    )
    assert "toy-1b, w3: lowest wikitext2/perplexity 12.59, by quarot at 3.01 true bits; 9.721 unquantized." in words
    assert "w4a4kv4: weights 4 bits, inputs of linears 4 bits, keys 4 bits, values 4 bits" in words
    assert "c4 128 windows of 2048 tokens" in words
    assert "wikitext2 test, windows of 2048, float32 loss" in words


def test_seeds_of_rotations_are_said_by_themselves(tmp_path):
    """A cell without rotations has the seed of the cell alone; the page mixes neither with the other."""
    for method, bitwidth, options in (
        ("rtn", "w3", {}), ("quarot", "w4a4kv4", {"rotation_seed": 0}), ("quarot", "w4a4kv4", {"rotation_seed": 10}),
        ("quarot", "w4a4kv4", {"rotation_seed": 9}),
    ):  # fmt: skip
        data = store.to_dict(golden_store.cell("m", method, bitwidth, 0, execution={"runs_dir": str(tmp_path)}))
        data["method"]["transform"]["options"] |= options
        spec = store.build(store.RunSpec, data)
        store.write_json(store.create(spec).result_path, golden_store.result(spec, store.create(spec), 3.0, 6.0, 0.5))
    page = Page(report_page(sources_of(tmp_path)))
    assert "with seed 0 and rotation seeds 0, 9 and 10, compared by" in page.words()
    assert "0/" not in page.words()
    assert page.tables[-1][0][3:5] == ["seed", "rotation seed"]
    assert sorted(tuple(row[3:5]) for row in page.tables[-1][1:]) == [("0", "-"), ("0", "0"), ("0", "10"), ("0", "9")]
    assert "Seeds seed 0 rotation seeds 0, 9 and 10" in page.words()


def test_bits_of_keys_and_values_by_block_are_said(tmp_path):
    data = store.to_dict(golden_store.cell("m", "quarot", "w4a4kv4", 0, execution={"runs_dir": str(tmp_path)}))
    data["bitwidth"]["kv_measure"] = "activation"
    spec = store.build(store.RunSpec, data)
    store.write_json(store.create(spec).result_path, golden_store.result(spec, store.create(spec), 3.0, 6.0, 0.5))
    words = Page(report_page(sources_of(tmp_path))).words()
    assert (
        "w4a4kv4_activation: weights 4 bits, inputs of linears 4 bits, keys and values 4 bits in the mean, by block (activation)"
        in words
    )


def test_provenance_and_run_ids_are_there(page, runs):
    listed = {row[4]: row[5] for row in page.tables[-1][1:]}
    assert listed == {folder.run_id: folder.state() for folder in store.all_runs(runs)} | {"-": "excluded"}
    here = provenance.collect()
    for words in (
        COMMIT,
        here["host"],
        here["platform"],
        here["cpu"],
        f"Python {here['python']}",
        f"torch {here['packages']['torch']}",
    ):
        assert words in page.words()
    assert f"git checkout {COMMIT}" in page.text
    assert "to 2027-01-15T08:00:00Z" in page.text


def test_front_is_among_equally_precise_activations(page):
    """quarot at w3 beats quarot at w4a4kv4 in both, which says nothing about rotations: activations are rounded there."""
    (alt,) = [
        i["alt"] for i in page.all("img") if i["alt"].startswith("toy-1b: wikitext2/perplexity against true bits")
    ]
    assert alt.endswith("Not beaten in both: quarot w3, quarot w4a4kv4, coquant w4a4kv4.")


def test_layers_are_those_of_the_lowest_bitwidth(page):
    alts = [image["alt"] for image in page.all("img") if "by block and linear" in image["alt"]]
    assert [alt.partition(":")[0] for alt in alts] == ["toy-1b, w3"]
    assert "rtn" in alts[0]
    assert "coquant" not in alts[0]


def test_a_cell_whose_spec_is_lost_is_in_no_plot_of_layers(two):
    golden_store.write_reports(two)
    (lost,) = two.glob("*-gptq-*")
    (lost / "spec.json").write_text("[")
    (alt,) = [i["alt"] for i in Page(report_page(sources_of(two))).all("img") if "by block and linear" in i["alt"]]
    assert "rtn" in alt
    assert "gptq" not in alt


def drawn_looks(figures):
    """For every name in a legend: marker, line and colour in each figure."""
    looks = {}
    for figure in figures:
        entries = [(mark, text) for axis in figure.axes if axis.get_legend() for mark, text in legend_of(axis)]
        assert entries
        for mark, text in entries:
            looks.setdefault(text, []).append((mark.get_marker(), mark.get_linestyle(), mark.get_color()))
    return looks


def legend_of(axis):
    legend = axis.get_legend()
    return zip(legend.legend_handles, [text.get_text() for text in legend.get_texts()], strict=True)


def test_a_bitwidth_and_a_method_look_the_same_in_all_plots_of_a_page(tmp_path, monkeypatch):
    """Against bits and against time the order of bitwidths is opposite, and the second model lacks what the first begins with."""
    cells = [("m", "rtn", "w3", 3, 40.0), ("m", "gptq", "w4a4kv4", 4, 10.0), ("m", "loaq", "w4a4kv4", 4, 20.0),
             ("m", "gptq", "w3", 3, 50.0), ("n", "gptq", "w4a4kv4", 4, 10.0), ("n", "loaq", "w4a4kv4", 4, 30.0)]  # fmt: skip
    sources = []
    for model, method, bitwidth, bits, seconds in cells:
        spec = golden_store.cell(model, method, bitwidth, 0, execution={"runs_dir": str(tmp_path)})
        folder = store.create(spec)
        done = golden_store.result(spec, folder, bits, 9.0 - bits, 0.5) | {"timings": {"round_s": seconds}}
        store.write_json(folder.result_path, done)
        sources.append((folder, spec))
    golden_store.write_reports(tmp_path)
    figures = []
    monkeypatch.setattr(plots, "_address", lambda figure: figures.append(figure) or "data:")
    report_page(sources)
    looks = drawn_looks(figures)
    assert {name: len(found) for name, found in looks.items()} == {
        "w3": 4,
        "w4a4kv4": 8,
        "rtn": 1,
        "gptq": 2,
        "loaq": 1,
    }
    assert all(len(set(found)) == 1 for found in looks.values()), looks
    for names in (("w3", "w4a4kv4"), ("rtn", "gptq", "loaq")):
        assert len({looks[name][0][0] for name in names}) == len(names), "markers differ: no colour is needed"


def test_cost_is_that_of_the_results(page):
    (row,) = [row for row in page.tables[2] if row[:3] == ["toy-1b", "coquant", "w4a4kv4"]]
    assert row[3:] == ["65.7", "-^1", "25.0", f"{6.57e8 / 2**20:.2f}", "-", "-"]
    assert "not recorded: the time leaves out what the cell found" in page.words()
    assert "in one process" not in page.text


def test_time_to_quantize_is_the_full_cost_whoever_paid_it(two):
    """gptq found what took 30 s, and stood 4 s at a lock: against time rtn is cheaper, although it spent more of its own."""
    shared = {"rtn": {"spared_s": 0.0, "waited_s": 0.0}, "gptq": {"spared_s": 30.0, "waited_s": 4.0}}
    for folder in store.all_runs(two):
        result = folder.result()
        own = {"rtn": 20.0, "gptq": 10.0}.get(result["method"], 0.0)
        changes = {
            "timings": {"round_s": own, "perplexity_s": 7.0},
            "shared": shared.get(result["method"], shared["rtn"]),
        }
        store.write_json(folder.result_path, result | changes)
    page = Page(report_page(sources_of(two)))
    times = {row[1]: row[3:6] for row in page.tables[1][2:]}
    assert times == {"fp16": ["0.0", "0.0", "7.0"], "rtn": ["20.0", "0.0", "7.0"], "gptq": ["36.0", "30.0", "7.0"]}
    assert page.tables[1][1][3:5] == ["quantize", "of it found"]
    assert "not recorded: the time" not in page.text
    assert "what a cell found made by another counts too" in page.words()
    frame = tables.tidy(sources_of(two))
    front = analysis.pareto(frame, "wikitext2/perplexity", "quantize_s").set_index("method")
    frame = frame.drop_duplicates("run_id").set_index("method")
    assert frame["quantize_s"].to_dict() == {"fp16": 0.0, "rtn": 20.0, "gptq": 36.0}
    assert frame["spared_s"].to_dict() == {"fp16": 0.0, "rtn": 0.0, "gptq": 30.0}
    assert front["cost"].to_dict() == {"fp16": 0.0, "rtn": 20.0, "gptq": 36.0}


def test_same_folders_give_the_same_bytes(runs, text):
    assert report_page(sources_of(runs, EXCLUDED), "Invented <figures> & more") == text


def cells_of(root):
    folders = {folder.run_id: folder for folder in store.all_runs(root)}
    return facts.read_cells(tables.tidy((folder, None) for folder in folders.values()), folders)


def test_changed_commits_are_said_with_how_many_cells_share_them(two):
    give_provenance(two)
    assert dict(facts.provenance(cells_of(two)))["Commit"] == [COMMIT]
    assert facts.reproduce(cells_of(two), [])[0] == f"git checkout {COMMIT}"
    give_provenance(two, git={"commit": "f" * 40, "dirty": "abc"})
    first, *_ = store.all_runs(two)
    shutil.rmtree(first.attempts[-1])
    commits = dict(facts.provenance(cells_of(two)))["Commit"]
    assert commits == [f"{COMMIT} (3 cells)", f"{'f' * 40} with uncommitted changes (abc) (2 cells)"]
    assert facts.reproduce(cells_of(two), ["demo", "seed=1"]) == [
        "python -m ptqbench sweep demo seed=1 --runs-dir reproduced",
        "python -m ptqbench report demo seed=1 --runs-dir reproduced",
    ]


def test_no_commit_is_offered_that_was_changed_when_it_ran(two):
    give_provenance(two, git={"commit": COMMIT, "dirty": "abc"})
    assert not any("git checkout" in line for line in facts.reproduce(cells_of(two), ["demo"]))


def test_cost_says_where_a_figure_is_not_that_of_the_cell_alone(two):
    give_provenance(two)
    frame = tables.tidy(sources_of(two))
    sheet = facts.cost(cells_of(two), tables.pivot(frame))
    assert "resumed" not in " ".join(sheet.notes)
    assert "in one process" not in " ".join(sheet.remarks)
    give_provenance(two)
    for folder in store.all_runs(two):
        for path in folder.attempts:
            store.write_json(path / "meta.json", json.loads((path / "meta.json").read_text()) | {"pid": 7})
    sheet = facts.cost(cells_of(two), tables.pivot(frame))
    assert "resumed: the time is that of the last attempt alone" in sheet.notes
    assert "in one process" in " ".join(sheet.remarks)


def test_papers_figures_are_there_where_a_cell_has_some(tmp_path, page):
    store.create(golden_store.cell("llama-3.2-1b", "quarot", "w4a4kv4", 0, execution={"runs_dir": str(tmp_path)}))
    assert "Reported by the papers" in Page(report_page(sources_of(tmp_path))).text
    assert "Reported by the papers" not in page.text


@pytest.mark.parametrize(
    ("method", "name"),
    [("gptq", "spec.json"), ("gptq", "result.json"), ("fp16", "attempts/001/meta.json"), ("gptq", "layers.parquet")],
)
def test_damaged_files_spoil_no_page(two, method, name):
    give_provenance(two)
    (folder,) = [folder for folder in store.all_runs(two) if method in folder.path.name]
    (folder.path / name).write_text("[")
    for other in store.all_runs(two):
        if other != folder:
            shutil.rmtree(other.path)
    page = Page(report_page(sources_of(two)))
    assert folder.run_id in page.text
    assert "No layer report of a quantized cell is at hand" in page.text


def test_a_sweep_of_which_nothing_is_done_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("name: mine\ntitle: Mine & yours\ngrids: [{method: rtn, bitwidth: [w3, w2]}]\n")
    (tmp_path / "none").mkdir()
    assert main(["report", "mine.yaml", "model=tiny", "--runs-dir", "none"]) == 0
    assert capsys.readouterr().out == "report: report.html\n"
    page = Page((tmp_path / "report.html").read_text())
    assert "Mine & yours" in page.text
    assert "1 quantization method on tiny at w3 and w2, with seed 0; nothing is measured yet." in page.words()
    assert "0 of 2 cells are done; 2 pending." in page.words()
    assert page.text.count("nothing to plot yet") == 2
    assert not page.all("img")
    assert [row[0] for row in page.tables[0][2:]] == ["rtn^1", "rtn^1"]
    assert "an instrument, not a benchmark" in page.words()
    assert "python -m ptqbench sweep mine.yaml model=tiny --runs-dir reproduced" in page.words()


def test_no_cell_at_all_gives_a_page_too(tmp_path, capsys):
    output = tmp_path / "new" / "page.html"
    (tmp_path / "none").mkdir()
    assert main(["report", "--runs-dir", str(tmp_path / "none"), "--output", str(output)]) == 0
    page = Page(output.read_text())
    assert "There is no cell to report on." in page.text
    assert not page.tables


def test_an_unknown_sweep_is_refused(capsys):
    assert main(["report", "dmeo"]) == 2
    assert "did you mean 'demo'?" in capsys.readouterr().err


def test_names_in_a_plot_overlap_neither_each_other_nor_marks():
    names = [[10, low, 40, low + 8] for low in (0, 1, 1, 3, 60, 61)]
    marks = [[0, 20, 12, 26], [100, 0, 110, 200]]
    shifts = _shifts(np.array([*names, *marks], float), len(names))
    placed = sorted((low + shift, low + shift + 8) for (_, low, _, _), shift in zip(names, shifts, strict=True))
    ends = sorted([*placed, (20, 26)])
    assert all(upper[0] - lower[1] > -0.1 for lower, upper in pairwise(ends))
    assert _shifts(np.array([[0, 0, 9, 9], [20, 0, 29, 9]], float), 2) == [0, 0], "side by side"


def test_a_name_that_does_not_fit_between_marks_goes_around_them():
    names, marks = [[10, 24, 40, 32], [10, 25, 40, 33]], [[0, 20, 12, 26], [0, 30, 12, 36], [0, 8, 12, 14]]
    shifts = _shifts(np.array([*names, *marks], float), 2)
    spans = sorted((low + by, high + by) for (_, low, _, high), by in zip(names, shifts, strict=True))
    assert spans == [(36, 44), (44, 52)]


@pytest.mark.parametrize(
    ("bits", "at_the_edge"),
    [
        ([("w3", 3.2), ("w4", 4.1), ("w4", 4.6), ("w4", 9.9)], [3]),
        ([("w3", 3.2), ("w4", 4.1), ("w4", 7.4), ("w4", 9.9)], [2, 3]),
        ([("w2", 2.1), ("w4", 4.1), ("w8", 8.1)], []),
        ([("w8", 8.1), ("w4", 4.1), ("w4", 7.4)], []),
        ([("w4", 4.1)], []),
    ],
)
def test_marks_with_far_more_bits_than_others_of_their_bitwidth_stand_at_the_edge(bits, at_the_edge):
    widths, costs = zip(*bits, strict=True)
    rows = pd.DataFrame({"bitwidth": widths, "cost": costs, "name": [f"m{n}" for n in range(len(bits))]})
    found = _within_reach(rows)
    for n, cost in enumerate(costs):
        moved = found["cost"][n] != cost
        assert moved == (n in at_the_edge)
        assert found["name"][n] == (f"m{n}: {cost:.2f} bits →" if moved else f"m{n}")
    inside = [cost for n, cost in enumerate(costs) if n not in at_the_edge]
    assert all(max(inside) < found["cost"][n] < min(costs[n], max(inside) + 1) for n in at_the_edge)


def test_page_needs_no_torch():
    code = "import sys, ptqbench.results.report_page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_unfinished_cell_that_cannot_be_read_does_not_spoil_the_page(tmp_path):
    """Every change of the schema leaves such cells behind."""
    root = tmp_path / "runs"
    shutil.copytree(golden_store.FOLDER, root)
    folder = store.RunFolder(next(root.glob("*-q2n-*-s2-*")))
    store.write_json(folder.spec_path, {**json.loads(folder.spec_path.read_text()), "unknown": 1})
    page = report_page([(store.RunFolder(path), None) for path in sorted(root.iterdir())])
    assert folder.run_id in page


@pytest.mark.parametrize("odd", [None, 7, "word", ["a", {}], {"commit": ["x"], "count": {}, "name": None}, -1e300])
def test_provenance_of_any_type_spoils_no_page(two, odd):
    names = ("time", "packages", "git", "python", "host", "platform", "cpu", "gpu", "command")
    give_provenance(two, **dict.fromkeys(names, odd))
    for folder in store.all_runs(two):
        store.write_json(folder.attempts[-1] / "heartbeat.json", {"time": odd})
        result = {**json.loads(folder.result_path.read_text()), "peak_host_gib": odd}
        result["timings"]["perplexity_s"] = odd
        store.write_json(folder.result_path, result)
    text = Page(report_page(sources_of(two))).text
    assert all(folder.run_id in text for folder in store.all_runs(two))


def test_a_folder_where_files_cannot_be_read_spoils_no_page(two):
    give_provenance(two)
    first, second, _ = store.all_runs(two)
    for path in (first.result_path, second.attempts[0] / "meta.json"):
        path.unlink()
        path.mkdir()
    text = Page(report_page(sources_of(two))).text
    assert "1 unreadable" in text
    assert second.run_id in text


def test_claims_stand_on_top_with_what_limits_them(tmp_path):
    for method in ("gptq", "rtn"):
        fidelity_cell(tmp_path, method)
    page = Page(report_page(sources_of(tmp_path)))
    words = page.words()
    assert words.index("What the papers claim") < words.index("Quality against size and time")
    assert "supported At 3 bits per row, GPTQ has a lower perplexity than rounding to the nearest code." in words
    assert "Answered on toy-1b, which is none of the paper's models." in words
    assert "These answers speak for toy-1b alone" in words
    assert "corrected for the number of tests (1; Holm)" in words
    assert "No such pair" not in words, "claims about other cells are left out"
    assert page.tables[0][1][:4] == ["1", "toy-1b", "gptq against rtn w3", "wikitext2/perplexity"]
    assert "What the papers claim" not in Page(report_page([])).words()
