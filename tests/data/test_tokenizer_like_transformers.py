"""Token ids are those of AutoTokenizer, BOS included, or those of tokenizer.json where AutoTokenizer departs from it."""

import json
import logging
import shutil

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from ptqbench.cell.spec import PerplexitySpec
from ptqbench.data import windows
from ptqbench.data.texts import Text
from ptqbench.data.tokenizer import load_tokenizer
from ptqbench.errors import ConfigError
from ptqbench.models.source import embedded_model_folder

TEXT = "the old bear sat by the river — and slept. \n\n Then, 12 birds came"


def folder_with(tmp_path, template=False, **changes):
    """The embedded tokenizer with a changed configuration; None removes a key. ``template`` adds a BOS as a post-processor."""
    source = embedded_model_folder("tiny")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copyfile(source / name, tmp_path / name)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(kept))
    if template:
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"bos_token": None},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"tokenizer_class": None},
    ],
    ids=str,
)
def test_token_ids_equal_those_of_autotokenizer(tmp_path, template, changes):
    folder = folder_with(tmp_path, template, **changes)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    joined, alone = Text((TEXT, TEXT), "\n\n"), Text((TEXT, "a"), None)
    assert list(windows.tokenize(joined, ours, 1024)) == [theirs(f"{TEXT}\n\n{TEXT}").input_ids]
    bos = [] if theirs.bos_token_id is None else [theirs.bos_token_id]
    expected = [bos + theirs(document, add_special_tokens=False).input_ids for document in alone.documents]
    assert list(windows.tokenize(alone, ours, 1024)) == expected


def test_truncation_and_padding_of_the_file_do_not_count(tmp_path, caplog):
    """A tokenizer saved in the middle of a training run; transformers sets its own for every call."""
    folder = folder_with(tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=4096)
    tokenizer.save(str(folder / "tokenizer.json"))
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert list(windows.tokenize(Text((TEXT * 9,), " "), ours, 1024)) == [theirs(TEXT * 9).input_ids]
    assert len(theirs(TEXT * 9).input_ids) > 16
    assert "token ids" not in caplog.text


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "GPT2Tokenizer", "T5Tokenizer", "BertTokenizer"])
def test_ids_of_tokenizer_json_win_and_the_log_says_so(tmp_path, caplog, name):
    """transformers rebuilds these classes from the vocabulary: other ids, or an error, on a file that is sound."""
    folder = folder_with(tmp_path, tokenizer_class=name)
    from_file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    from_file.pre_tokenizer = None
    from_file.save(str(folder / "tokenizer.json"))
    expected = from_file.encode(TEXT, add_special_tokens=False).ids
    try:
        theirs = AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False).input_ids
    except Exception:
        theirs = None
    assert theirs != expected, "the test shows nothing"
    with caplog.at_level(logging.WARNING, "ptqbench"):
        ours = load_tokenizer(folder)
    assert ours(TEXT, add_special_tokens=False).input_ids == expected
    assert "token ids are those of" in caplog.text


def test_a_sound_tokenizer_gives_no_warning(tmp_path, caplog):
    load_tokenizer(folder_with(tmp_path))
    assert "token ids" not in caplog.text


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_damaged_tokenizer_is_one_line(tmp_path, content):
    folder = folder_with(tmp_path)
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"the tokenizer in .* cannot be read") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_documents_tokenized_in_batches_give_the_same_ids(tmp_path, monkeypatch):
    path = tmp_path / "t.txt"
    path.write_text("|".join(f"{TEXT} {i}" for i in range(30)))
    spec = PerplexitySpec(dataset="file", path=str(path), separator="|", seq_len=16)
    tokenizer = load_tokenizer(embedded_model_folder("tiny"))
    whole = windows.evaluation_windows(spec, tokenizer, 1024)
    monkeypatch.setattr(windows, "BATCH_CHARACTERS", 100)
    assert torch.equal(windows.evaluation_windows(spec, tokenizer, 1024), whole)
