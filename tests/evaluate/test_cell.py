"""The evaluation of a cell: what it writes, what it does not repeat, and the comparison of two cells."""

import contextlib
import dataclasses
import json
import math

import pandas
import pytest
import torch
from transformers import AutoTokenizer

from ptqbench.cell.spec import EvaluationSpec, PerplexitySpec
from ptqbench.errors import ConfigError
from ptqbench.evaluate import loglikelihood, records, zero_shot
from ptqbench.evaluate import perplexity as perplexity_module
from ptqbench.evaluate.cell import CellEvaluation, averages, load
from ptqbench.evaluate.unquantized import Unquantized
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.source import ModelSource
from ptqbench.results.compare import compare_cells
from ptqbench.runs import folder as store
from ptqbench.runs.artefacts import Artefacts
from ptqbench.runs.attempt import Silent
from ptqbench.runs.folder import RunFolder

PIQA = [
    {"goal": f"Open door {i}", "sol1": "Turn the handle.", "sol2": f"Eat {i} apples.", "label": i % 2} for i in range(9)
]
WINOGRANDE = [
    {"sentence": f"The cat {i} saw the dog and _ ran.", "option1": "the cat", "option2": "the dog", "answer": "2"}
    for i in range(5)
]


@pytest.fixture
def evaluation(tmp_path):
    """Two texts and two tasks, all local."""
    texts = {}
    for label, word in (("first", "red "), ("second", "blue ")):
        path = tmp_path / f"{label}.txt"
        path.write_text(" ".join(f"the {word} bird {i} sings to the moon" for i in range(120)))
        texts[label] = PerplexitySpec(dataset="file", path=str(path), seq_len=48, protocol="documents")
    for name, rows in (("piqa.validation", PIQA), ("winogrande", WINOGRANDE)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = ("piqa/acc_norm", "winogrande/acc")
    return EvaluationSpec(name="e", texts=texts, tasks=tasks, batch_size=4, data_dir=str(tmp_path))


def folder_of(tmp_path, identifier="0123456789ab"):
    folder = RunFolder(tmp_path / f"run-{identifier}")
    folder.path.mkdir(exist_ok=True)
    return folder


def evaluate(checkpoint, spec, folder, overlay=None):
    model = BlockwiseModel(ModelSource(checkpoint), torch.float32, torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    measure = lambda name: contextlib.nullcontext()
    ready = load(spec, folder, tokenizer, model.architecture.vocab_size)
    unquantized = Unquantized(model, {"model": str(checkpoint)}, Artefacts(folder.path.parent / ".artefacts"))
    return CellEvaluation(spec, folder, model, overlay, tokenizer, Silent(), measure, ready, unquantized).run()


def test_records_hold_what_the_figures_are_made_of(checkpoint, evaluation, tmp_path):
    folder = folder_of(tmp_path)
    metrics = evaluate(checkpoint(), evaluation, folder)
    assert list(metrics) == ["first/perplexity", "second/perplexity", "piqa/acc_norm", "winogrande/acc"]
    for label in ("first", "second"):
        found = metrics[f"{label}/perplexity"]
        rows = pandas.read_parquet(folder.windows_path(label))
        assert len(rows) == found["n_windows"] > 5
        assert math.exp(rows["nll"].sum() / rows["n_tokens"].sum()) == pytest.approx(found["value"], rel=1e-12)
        assert rows["digest"].nunique() == len(rows)
        assert (found["batch_size"], found["protocol"], found["ppl_dtype"]) == (4, "documents", "float32")
    rows = pandas.read_parquet(folder.examples_path("piqa"))
    assert rows["acc_norm"].mean() == metrics["piqa/acc_norm"]["value"]
    byte_lengths = [[len(row["sol1"]), len(row["sol2"])] for row in PIQA]
    for scores, lengths, row, right in zip(rows["log_likelihoods"], byte_lengths, PIQA, rows["acc_norm"], strict=True):
        best = max((0, 1), key=lambda i: scores[i] / lengths[i])
        assert right == (best == row["label"])
    assert metrics["piqa/acc_norm"]["batch_size"] == 4
    assert metrics["winogrande/acc"]["n_examples"] == 5
    import pyarrow.parquet

    layout = pyarrow.parquet.ParquetFile(folder.windows_path("first")).metadata.row_group(0).column(3)
    assert layout.compression == "ZSTD"


def test_finished_texts_and_tasks_are_not_redone(checkpoint, evaluation, tmp_path, monkeypatch):
    source, folder, measured = checkpoint(), folder_of(tmp_path), []
    perplexity, examples = perplexity_module.perplexity, zero_shot.Harness.evaluate

    def counted(model, windows, *rest):
        measured.append("text")
        if len(measured) == 2:
            raise KeyboardInterrupt
        return perplexity(model, windows, *rest)

    def one_task(self, name, request, task):
        measured.append(name)
        if name == "winogrande" and measured.count(name) == 1:
            raise KeyboardInterrupt
        return examples(self, name, request, task)

    monkeypatch.setattr(perplexity_module, "perplexity", counted)
    monkeypatch.setattr(zero_shot.Harness, "evaluate", one_task)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluate(source, evaluation, folder)
    resumed = evaluate(source, evaluation, folder)
    assert measured == ["text", "text", "text", "piqa", "winogrande", "winogrande"]
    assert evaluate(source, evaluation, folder) == resumed
    assert len(measured) == 6
    assert not list(folder.records_path.rglob("*.tmp"))
    assert evaluate(source, evaluation, folder_of(tmp_path, "ba9876543210")) == resumed


def test_half_a_file_is_measured_again_and_another_cells_is_refused(checkpoint, evaluation, tmp_path):
    source, folder = checkpoint(), folder_of(tmp_path)
    first = evaluate(source, evaluation, folder)
    path = folder.windows_path("first")
    path.write_bytes(path.read_bytes()[:200])
    assert evaluate(source, evaluation, folder) == first
    other = folder_of(tmp_path, "ba9876543210")
    other.windows_path("first").parent.mkdir(parents=True)
    other.windows_path("first").write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match="belongs to cell 0123456789ab, not ba9876543210"):
        evaluate(source, evaluation, other)


def test_labels_become_file_names(tmp_path):
    folder = RunFolder(tmp_path / "run-0123456789ab")
    assert folder.windows_path("../a b").parent == folder.records_path / "windows"
    assert folder.windows_path("../a b") != folder.windows_path("a b")


def test_average_names_its_tasks_and_counts_each_once():
    metrics = {"piqa/acc": {"value": 0.5, "stderr": 0.03}, "boolq/acc": {"value": 0.8, "stderr": 0.04}}
    (name,) = found = averages(("piqa/acc", "boolq/acc"), metrics)
    assert name == "average(piqa/acc, boolq/acc)"
    assert found[name] == {
        "value": pytest.approx(0.65),
        "stderr": pytest.approx(0.025),
        "tasks": ["piqa/acc", "boolq/acc"],
    }
    assert averages(("piqa/acc",), metrics) == {}
    assert averages(("piqa/acc", "piqa/acc_norm"), metrics) == {}


def finished(checkpoint, spec, folder, overlay=None):
    metrics = evaluate(checkpoint, spec, folder, overlay)
    result = {"run_id": folder.run_id, "metrics": metrics, "averages": averages(spec.tasks, metrics)}
    store.write_json(folder.result_path, result)
    return folder


def noise(index, block):
    generator = torch.Generator().manual_seed(index)
    weight = block.get_submodule("mlp.down_proj").weight
    weight.data += 2.0 * torch.randn(weight.shape, generator=generator)


def test_two_cells_are_compared_window_by_window_and_example_by_example(checkpoint, evaluation, tmp_path):
    source = checkpoint()
    plain = finished(source, evaluation, folder_of(tmp_path))
    noisy = finished(source, evaluation, folder_of(tmp_path, "ba9876543210"), noise)
    same = compare_cells(plain, finished(source, evaluation, folder_of(tmp_path, "aaaaaaaaaaaa")))
    assert len(same) == 5
    assert all("not distinguishable at this sample size" in judged.verdict for judged in same)
    found = {judged.metric: judged for judged in compare_cells(plain, noisy, ("plain", "noisy"))}
    assert found["first/perplexity"].found.n == plain.result()["metrics"]["first/perplexity"]["n_windows"]
    values = [folder.result()["metrics"]["first/perplexity"]["value"] for folder in (plain, noisy)]
    assert found["first/perplexity"].found.difference == pytest.approx(values[1] / values[0] - 1)
    assert found["first/perplexity"].verdict.startswith("noisy is worse than plain")
    average = found["average(piqa/acc_norm, winogrande/acc)"].found
    assert average.n == 14
    averaged = [next(iter(folder.result()["averages"].values()))["value"] for folder in (plain, noisy)]
    assert (average.first, average.second) == (pytest.approx(averaged[0]), pytest.approx(averaged[1]))
    assert all(judged.adjusted >= judged.found.p_value for judged in found.values())


def test_cells_on_other_examples_are_not_compared(checkpoint, evaluation, tmp_path):
    source = checkpoint()
    plain = finished(source, evaluation, folder_of(tmp_path))
    (tmp_path / "piqa.validation.jsonl").write_text(json.dumps(PIQA[0]) + "\n" + json.dumps(PIQA[2]) + "\n")
    other = finished(source, evaluation, folder_of(tmp_path, "ba9876543210"))
    with pytest.raises(ConfigError, match="same examples"):
        compare_cells(plain, other)
    with pytest.raises(ConfigError, match="two finished cells"):
        compare_cells(plain, folder_of(tmp_path, "cccccccccccc"))
    with pytest.raises(ConfigError, match="no record of 'boolq/acc'"):
        records.example_scores(plain, "boolq/acc")
    with pytest.raises(ConfigError, match="no such record"):
        records.window_scores(plain, "third")


def test_modules_of_records_do_not_import_torch():
    import subprocess
    import sys

    code = "import ptqbench.results.compare, sys; assert not {'torch', 'lm_eval', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def blocks(evaluation):
    return dataclasses.replace(evaluation, texts={}, engine="blocks")


def test_tasks_block_by_block_have_the_scores_of_the_whole_model(checkpoint, evaluation, tmp_path):
    source = checkpoint("qwen2")
    whole, streamed = folder_of(tmp_path), folder_of(tmp_path, "ba9876543210")
    expected = evaluate(source, dataclasses.replace(evaluation, texts={}), whole)
    assert evaluate(source, blocks(evaluation), streamed) == expected
    for task in ("piqa", "winogrande"):
        ours, theirs = (pandas.read_parquet(folder.examples_path(task)) for folder in (streamed, whole))
        assert (ours["digest"] == theirs["digest"]).all()
        for a, b in zip(ours["log_likelihoods"], theirs["log_likelihoods"], strict=True):
            assert a == pytest.approx(b, abs=1e-4)
    assert not streamed.state_path.exists()


def test_killed_between_chunks_the_tasks_go_on_and_end_with_the_same_bytes(
    checkpoint, evaluation, tmp_path, monkeypatch
):
    source, undisturbed, folder = checkpoint(), folder_of(tmp_path), folder_of(tmp_path, "ba9876543210")
    monkeypatch.setattr("ptqbench.evaluate.loglikelihood.CHUNK_BYTES", 60 * 48 * 4)  # sixty tokens of this model
    compute, chunks = loglikelihood.log_likelihoods, []

    def dying(*given):
        chunks.append(len(given[1]))
        if len(chunks) == 3:
            raise KeyboardInterrupt
        return compute(*given)

    expected = evaluate(source, blocks(evaluation), undisturbed)
    monkeypatch.setattr(loglikelihood, "log_likelihoods", dying)
    with pytest.raises(KeyboardInterrupt):
        evaluate(source, blocks(evaluation), folder)
    kept = len(list((folder.state_path / "scores").glob("*.parquet")))
    assert kept == 2
    assert evaluate(source, blocks(evaluation), folder) == expected
    n_requests = 2 * (len(PIQA) + len(WINOGRANDE))
    assert sum(chunks) - chunks[2] == n_requests  # only the chunk that was under way is scored again
    for task in ("piqa", "winogrande"):
        rows, same = (pandas.read_parquet(f.examples_path(task)) for f in (folder, undisturbed))
        pandas.testing.assert_frame_equal(rows, same, check_exact=True)


def louder(index, block):
    """Stands for quantized weights: the model answers differently."""
    block.mlp.down_proj.weight.data *= 30.0


def test_fidelity_compares_with_the_unquantized_model(checkpoint, evaluation, tmp_path):
    """Answers and windows are those of two cells that were measured by themselves."""
    model, spec = checkpoint(), dataclasses.replace(evaluation, engine="blocks", fidelity=True)
    folder = folder_of(tmp_path, "compared0000")
    metrics = evaluate(model, spec, folder, louder)
    for label in ("first", "second"):
        rows = pandas.read_parquet(folder.windows_path(label))
        for name, low in (("kl", 1e-4), ("top1", 0.0)):
            found = metrics[f"{label}/{name}"]
            assert found["value"] == pytest.approx(rows[name].mean(), rel=1e-12)
            assert found["value"] > low
        assert 0 <= metrics[f"{label}/kl"]["noise"] < 1e-6
    plain = dataclasses.replace(spec, fidelity=False)
    folders = [folder_of(tmp_path, name) for name in ("quantized000", "unquantized0")]
    alone = [evaluate(model, plain, where, overlay) for where, overlay in zip(folders, (louder, None), strict=True)]
    assert {name: metrics[name] for name in alone[0]} == alone[0], "comparing changes nothing else"
    for task in ("piqa", "winogrande"):
        ours, theirs = (pandas.read_parquet(where.examples_path(task)) for where in folders)
        answers = [[scores.argmax() for scores in rows["log_likelihoods"]] for rows in (ours, theirs)]
        changed = [a != b for a, b in zip(*answers, strict=True)]
        assert pandas.read_parquet(folder.examples_path(task))["flipped"].tolist() == changed
        found, moved = metrics[f"{task}/flips"], ours["acc"] - theirs["acc"]
        assert found["value"] == sum(changed) / len(changed)
        assert (found["to_wrong"], found["to_right"]) == ((moved < 0).sum(), (moved > 0).sum())
    assert any(metrics[f"{task}/flips"]["value"] for task in ("piqa", "winogrande"))
    # An attempt that goes on, and another cell, find what is there.
    assert evaluate(model, spec, folder, louder) == metrics
    store = Artefacts(tmp_path / ".artefacts")
    stored = sorted(path.name for path in store.root.glob("*.safetensors"))
    assert [sum(name.startswith(kind) for name in stored) for kind in ("reference-", "noise-", "scores-")] == [2, 2, 1]


def test_the_unquantized_model_is_at_no_distance_from_itself(checkpoint, evaluation, tmp_path):
    spec = dataclasses.replace(evaluation, engine="blocks", fidelity=True)
    metrics = evaluate(checkpoint(), spec, folder_of(tmp_path))
    assert all(metrics[f"{label}/kl"]["value"] < 1e-6 for label in ("first", "second"))
    assert all(metrics[f"{label}/top1"]["value"] == 1 for label in ("first", "second"))
    assert all(metrics[f"{task}/flips"]["value"] == 0 for task in ("piqa", "winogrande"))


def test_the_engine_belongs_to_tasks(evaluation):
    assert dataclasses.replace(evaluation, tasks=(), engine="blocks").engine == "whole"
    with pytest.raises(ConfigError, match=r"fidelity.*engine=blocks"):
        dataclasses.replace(evaluation, fidelity=True, engine="whole")
