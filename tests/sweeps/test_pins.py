"""A cell is measured on the content of its identity or not at all; what cannot be measured is refused when it is composed."""

import errno
import io
import json
import shutil

import numpy
import pytest

from ptqbench import run
from ptqbench.cell.spec import PerplexitySpec
from ptqbench.data.tokenizer import load_tokenizer
from ptqbench.data.windows import calibration_windows, evaluation_windows
from ptqbench.engine.work import Work
from ptqbench.errors import CalibrationError, ConfigError, RunFailed, StorageError
from ptqbench.models.source import embedded_model_folder
from ptqbench.runs import folder as store
from ptqbench.runs.failures import classify
from ptqbench.sweeps.compose import compose_cell, resolved
from ptqbench.sweeps.lengths import check_length
from ptqbench.sweeps.pins import check_unchanged

STORY = "The old bear sat by the river and slept until the moon was high. "
QUESTION = {"goal": "Open the door", "sol1": "Turn the handle.", "sol2": "Eat it.", "label": 0}


@pytest.fixture
def place(tmp_path):
    """A model, texts, task data, windows and rotations in one folder, to be changed."""
    shutil.copytree(embedded_model_folder("tiny"), tmp_path / "model")
    (tmp_path / "calibration.txt").write_text(STORY * 40)
    (tmp_path / "evaluation.txt").write_text(STORY[::-1] * 40)
    (tmp_path / "piqa.validation.jsonl").write_text(json.dumps(QUESTION) + "\n")
    numpy.save(tmp_path / "windows.npy", numpy.arange(64).reshape(2, 32))
    numpy.save(tmp_path / "rotations.npy", numpy.eye(2))  # read by nobody here, but a file with a digest
    return tmp_path


def words(place, *more):
    return [
        "+method=rtn", "bitwidth=w4", "model=local", f"model.path={place}/model", "evaluation=file",
        f"evaluation.texts.file.path={place}/evaluation.txt", "evaluation.texts.file.seq_len=64",
        f"execution.runs_dir={place}/runs", "execution.progress=false", *more,
    ]  # fmt: skip


def from_file(place):
    return ["calibration=file", f"calibration.path={place}/calibration.txt", "calibration.n_samples=2",
            "calibration.seq_len=32"]  # fmt: skip


def changed(path):
    """The same size, other bytes."""
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])


@pytest.mark.parametrize(
    ("name", "words_said"),
    [
        ("model/model.safetensors", "model .*/model has changed"),
        ("model/tokenizer_config.json", "model .*/model has changed"),
        ("calibration.txt", r"calibration text .*calibration\.txt has changed"),
        ("evaluation.txt", r"text of evaluation\.texts\.file .* has changed"),
        ("piqa.validation.jsonl", "data of task piqa has changed"),
        ("rotations.npy", r"method\.transform\.rotation_file=.*rotations\.npy has changed"),
    ],
)
def test_content_that_changed_after_the_cell_was_composed_is_refused(place, name, words_said):
    spec = compose_cell(
        words(place, *from_file(place), "evaluation.tasks=[piqa/acc]", f"evaluation.data_dir={place}", "method/transform=hadamard",
              "method.transform.r1=file", f"method.transform.rotation_file={place}/rotations.npy")
    )  # fmt: skip
    check_unchanged(spec)
    content = (place / name).read_bytes()
    changed(place / name)
    with pytest.raises(ConfigError, match=words_said + " since this cell was composed") as caught:
        check_unchanged(spec)
    assert "\n" not in str(caught.value)
    (place / name).unlink()
    with pytest.raises(ConfigError):
        check_unchanged(spec)
    (place / name).write_bytes(content)  # another inode, other times, the same content
    check_unchanged(spec)


def test_windows_that_changed_after_the_cell_was_composed_are_refused(place):
    spec = compose_cell(words(place, "calibration=auto", f"calibration.windows={place}/windows.npy"))
    assert (spec.calibration.dataset, spec.calibration.n_samples, spec.calibration.seq_len) == ("windows", 2, 32)
    check_unchanged(spec)
    numpy.save(place / "windows.npy", numpy.arange(1, 65).reshape(2, 32))
    with pytest.raises(ConfigError, match=r"calibration\.windows=.*windows\.npy has changed since"):
        check_unchanged(spec)


def test_a_changed_model_is_refused_before_anything_is_measured(place, monkeypatch):
    folder = store.create(compose_cell(words(place, *from_file(place))))
    changed(place / "model" / "model.safetensors")
    monkeypatch.setattr(run, "_work", lambda *rest: pytest.fail("it was measured"))
    with pytest.raises(RunFailed, match="has changed since this cell was composed"):
        run.run_folder(folder)
    assert (folder.failure()["kind"], folder.result()) == ("config", None)


def test_data_that_cannot_be_measured_are_found_before_the_first_block(place, monkeypatch):
    (place / "winogrande.train.jsonl").write_text("{}\n")
    tasks = ["evaluation.tasks=[winogrande/acc]", f"evaluation.data_dir={place}"]
    folder = store.create(compose_cell(words(place, *from_file(place), *tasks)))
    monkeypatch.setattr(Work, "quantize", lambda *rest: pytest.fail("it was quantized"))
    with pytest.raises(RunFailed, match=r"has no winogrande\.validation\.jsonl"):
        run.run_folder(folder)
    assert folder.failure()["kind"] == "config"


EVALUATION, CALIBRATION = "evaluation.texts.file", "calibration"


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        (EVALUATION, "separator=null"),
        (EVALUATION, "separator=sat"),
        (CALIBRATION, "separator=null"),
        (CALIBRATION, "sampling=document_random"),
    ],
)
def test_a_text_with_more_bytes_than_a_window_has_tokens_is_counted_when_the_cell_is_composed(place, text, setting):
    """The longest window that the text fills is taken, and the cell can cut it; one that is a token longer is refused."""
    (place / "short.txt").write_text(STORY + "So it was. ")
    tokenizer = load_tokenizer(place / "model")
    whole = STORY + "So it was. "
    pieces = [piece.strip() for piece in whole.split("sat")] if setting == "separator=sat" else [whole]
    n_tokens = sum(1 + len(tokenizer(piece, add_special_tokens=False).input_ids) for piece in pieces)
    fits = n_tokens - (text == CALIBRATION)  # whose windows start anywhere
    about = [f"{text}.path={place}/short.txt", f"{text}.{setting}"]
    spec = compose_cell(words(place, *from_file(place), *about, f"{text}.seq_len={fits}"))
    assert len(calibration_windows(spec.calibration, tokenizer, 1024, 0)) == 2
    assert len(evaluation_windows(spec.evaluation.texts["file"], tokenizer, 1024)) >= 1
    with pytest.raises(CalibrationError, match=rf"^{text}: .*at most {n_tokens} tokens.*{text}\.seq_len={fits + 1}"):
        compose_cell(words(place, *from_file(place), *about, f"{text}.seq_len={fits + 1}"))


@pytest.mark.parametrize(("content", "said"), [(b"\xe9" * 4000, "not UTF-8"), (STORY.encode(), "at most 28 tokens")])
def test_every_cell_of_a_text_that_cannot_be_measured_is_refused(place, content, said):
    (place / "evaluation.txt").write_bytes(content)
    found = resolved([(bits, words(place, *from_file(place), f"bitwidth={bits}")) for bits in ("w4", "w3", "w2")])
    assert [said in str(cell.problem) for cell in found] == [True] * 3


@pytest.mark.parametrize("content", [None, "{"])
def test_texts_are_not_counted_without_a_tokenizer_that_can_be_read(place, content):
    (place / "short.txt").write_text(STORY)
    file = place / "model" / "tokenizer.json"
    file.unlink() if content is None else file.write_text(content)
    check_length(
        PerplexitySpec("file", path=f"{place}/short.txt", seq_len=60, protocol="documents"), "text", place / "model"
    )


def test_a_document_has_no_bos_token_where_the_tokenizer_has_none(place):
    (place / "short.txt").write_text(STORY)
    text = PerplexitySpec("file", path=f"{place}/short.txt", seq_len=60, protocol="documents")
    (place / "model" / "tokenizer_config.json").write_text('{"bos_token": null}')
    with pytest.raises(CalibrationError, match="at most 27 tokens"):
        check_length(text, "evaluation.texts.file", place / "model")


def test_content_that_changes_while_the_cell_runs_leaves_nothing_behind(place, monkeypatch):
    folder = store.create(compose_cell(words(place, *from_file(place))))
    evaluate, shared = Work.evaluate, lambda: list((place / "runs").rglob("calibration-*.safetensors"))

    def overwriting(*rest):
        found = evaluate(*rest)
        changed(place / "model" / "model.safetensors")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Work, "evaluate", overwriting)
        with pytest.raises(RunFailed, match="has changed since this cell was composed"):
            run.run_folder(folder)
    assert folder.result() is None
    assert not folder.state_path.exists()
    assert not folder.records_path.exists()
    assert not shared()
    changed(place / "model" / "model.safetensors")  # back again
    result = run.run_folder(folder)
    assert shared()
    assert result["metrics"]["file/perplexity"]["mean_loss"] > 0
    assert result["tokenizer"] == "TokenizersBackend"


def test_windows_from_a_file_are_the_same_cell_wherever_they_lie(place):
    from ptqbench.cell.fingerprint import run_id

    shutil.copyfile(place / "windows.npy", place / "moved.npy")
    (place / "windows.json").write_text(json.dumps(numpy.arange(64).reshape(2, 32).tolist()))
    ids = {
        run_id(compose_cell(words(place, "calibration=auto", f"calibration.windows={place}/{name}")))
        for name in ("windows.npy", "moved.npy", "windows.json")
    }
    assert len(ids) == 1
    with pytest.raises(ConfigError, match=r"calibration\.n_samples=7 is not used beside calibration\.windows"):
        compose_cell(
            words(place, "calibration=auto", f"calibration.windows={place}/windows.npy", "calibration.n_samples=7")
        )


def test_calibration_windows_beyond_the_context_are_a_remark_of_the_result(place):
    longer = words(place, *from_file(place), "calibration.seq_len=520", "calibration.n_samples=1", "method/solver=rtn")
    (remark,) = run.run_folder(store.create(compose_cell(longer)))["remarks"]
    assert remark.startswith("calibration.seq_len=520 is longer than the context of the model")


def test_windows_beyond_the_context_are_refused_unless_asked_for(place):
    place_said = "evaluation.texts.file.seq_len"
    asked = words(place, *from_file(place), f"{place_said}=513")
    with pytest.raises(
        ConfigError, match=rf"{place_said}=513 is longer than .*max_position_embeddings=512.*beyond_context"
    ):
        compose_cell(asked)
    from ptqbench.cell.fingerprint import run_id

    allowed = compose_cell([*asked, "execution.beyond_context=true"])
    within = words(place, *from_file(place), f"{place_said}=512")
    assert (
        run_id(compose_cell(within))
        == run_id(compose_cell([*within, "execution.beyond_context=true"]))
        != run_id(allowed)
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["calibration=tiny", "calibration.path=x.txt"], r"calibration\.path='x\.txt' is not read.*calibration=file"),
        (["evaluation.data_dir=."], r"evaluation\.data_dir='\.' is not read"),
        (["execution.threads=1000000"], r"execution\.threads.*less than or equal to 1024"),
        (["execution.artefacts_gib=1e300"], r"execution\.artefacts_gib"),
        (["bitwidth.group_size=100000000000000000000"], r"bitwidth\.group_size"),
        (["calibration.n_samples=100000000000"], r"calibration\.n_samples"),
        (["calibration.n_samples=100000000"], r"tokens, expected at most"),
    ],
)
def test_what_cannot_be_meant_is_said_when_the_cell_is_composed(place, more, said):
    with pytest.raises(ConfigError, match=said):
        compose_cell(words(place, *from_file(place), *more))


@pytest.mark.parametrize(
    ("content", "said"), [(b"\xff\xfe\x00", "is not UTF-8"), (b"", "is empty"), (b'{"text": "a"}\n', "holds JSON")]
)
def test_texts_that_cannot_be_read_are_said_when_the_cell_is_composed(place, content, said):
    (place / "evaluation.txt").write_bytes(content)
    with pytest.raises(Exception, match=said):
        compose_cell(words(place, *from_file(place)))


@pytest.mark.parametrize("name", ["model/model.safetensors", "model/config.json", "calibration.txt"])
def test_a_disk_that_fails_is_no_wrong_request_and_costs_no_finished_work(place, monkeypatch, name):
    spec = compose_cell(words(place, *from_file(place)))
    folder, plain = store.RunFolder(place / "cell-0123456789ab"), io.open
    folder.state_path.mkdir(parents=True)

    def failing(path, *arguments, **named):
        if str(path).endswith(name):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return plain(path, *arguments, **named)

    monkeypatch.setattr("io.open", failing)
    with pytest.raises(StorageError, match=r"cannot be read: Input/output error") as caught:
        run._check_still(spec, folder, None)
    assert classify(caught.value).name == "disk"
    assert folder.state_path.is_dir()
