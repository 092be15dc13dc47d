"""Named perplexity protocols against the loaders of the GPTQ code, written out; hub texts from local files."""

import gzip
import json
import random

import pytest
import torch

from ptqbench.cell.spec import EvaluationSpec, PerplexitySpec
from ptqbench.data import protocols, texts
from ptqbench.data.protocols import PROTOCOLS, complete
from ptqbench.data.tasks import TASKS, requested, task_digests
from ptqbench.data.texts import load_text, text_digest
from ptqbench.data.tokenizer import load_tokenizer
from ptqbench.data.windows import evaluation_windows, tokenize
from ptqbench.errors import CalibrationError, ConfigError

BOS = 1


class Characters:
    """One token per character, a BOS at the start of whatever is encoded with special tokens."""

    bos_token_id = BOS

    def __call__(self, text, add_special_tokens=True, verbose=True):
        encode = lambda t: [BOS] * add_special_tokens + [ord(c) for c in t]
        return type("Encoding", (), {"input_ids": encode(text) if isinstance(text, str) else [encode(t) for t in text]})


@pytest.fixture
def documents(tmp_path):
    """1,150 rows of between 3 and 62 characters, as the JSON lines of C4 are."""
    rows = [f"{i:03d}" + "abcdefghij klmnopqrst" * (i % 3 + 1) * (i % 7 > 0) for i in range(1150)]
    with gzip.open(tmp_path / "c4-validation.json.gz", "wt") as stream:
        stream.writelines(json.dumps({"text": row, "url": "u"}) + "\n" for row in rows)
    return rows, str(tmp_path / "c4-validation.json.gz")


def windows_of(dataset, path, seq_len, protocol):
    spec = PerplexitySpec(dataset=dataset, path=path, seq_len=seq_len, protocol=protocol)
    return evaluation_windows(spec, Characters(), 300)


def test_wikitext2_token_count(real_data):
    """299,078 tokens of Qwen2.5, the figure every code gets from the rows of the hub joined by blank lines."""
    spec = complete(PerplexitySpec(dataset="wikitext2", path=str(real_data / "text" / "wikitext2.test.raw")))
    assert (spec.protocol, spec.split) == ("wikitext2", "test")
    loaded, known = load_tokenizer(real_data / "tokenizers" / "qwen2.5"), {}

    def tokenizer(joined, verbose):  # takes seconds, so once
        known.setdefault(joined, loaded(joined, verbose=verbose))
        return known[joined]

    text = load_text(spec)
    assert text.documents[:3] == ("", " = Robert Boulter = \n", "")
    (row,) = tokenize(text, tokenizer, 151936)
    assert len(row) == 299_078
    windows = evaluation_windows(spec, tokenizer, 151936)
    assert windows.shape == (146, 2048)
    assert windows.flatten().tolist() == row[: 146 * 2048]
    assert text_digest(spec).startswith("sha256:173c87a5")


def test_c4_sampled_is_get_c4_of_the_gptq_code(documents):
    rows, path = documents
    encode, seq_len = Characters(), 40
    generator, expected = random.Random(0), []
    for _ in range(256):
        while True:
            i = generator.randint(0, len(rows) - 1)
            ids = encode(rows[i]).input_ids
            if len(ids) > seq_len:
                break
        i = generator.randint(0, len(ids) - seq_len - 1)
        expected.append(ids[i : i + seq_len])
    assert windows_of("c4", path, seq_len, "c4_sampled").tolist() == expected


def test_c4_joined_is_get_c4_new_of_the_gptq_code(documents):
    rows, path = documents
    ids = Characters()(" ".join(rows[:1100])).input_ids
    found = windows_of("c4", path, 50, "c4_joined")
    assert found.shape == (256, 50)
    assert found.flatten().tolist() == ids[: 256 * 50]
    assert (found == BOS).sum() == 1  # at the very start, not per window
    assert len(windows_of("c4", path, 4000, "c4_joined")) == len(ids) // 4000


def test_two_ptb_protocols(tmp_path):
    lines = [f" no it was n't black monday {i} \n" for i in range(30)]
    (tmp_path / "ptb.txt").write_text("".join(lines))
    for protocol, join in (("ptb_validation", "\n\n"), ("ptb_test", " ")):
        ids = Characters()(join.join(line.strip() for line in lines)).input_ids
        found = windows_of("ptb", str(tmp_path / "ptb.txt"), 32, protocol)
        assert found.flatten().tolist() == ids[: len(ids) // 32 * 32]


def test_no_document_long_enough_to_crop(documents, monkeypatch):
    monkeypatch.setattr("ptqbench.data.windows.MAX_DRAWS", 20)
    with pytest.raises(CalibrationError, match="no document of more than 500 tokens in 20 draws"):
        windows_of("c4", documents[1], 500, "c4_sampled")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"dataset": "c4"}, "protocol=c4_sampled or protocol=c4_joined"),
        ({"dataset": "ptb"}, "protocol=ptb_validation or protocol=ptb_test"),
        ({"dataset": "c4", "protocol": "c4_new"}, "unknown protocol 'c4_new'"),
        ({"dataset": "c4", "protocol": "ptb_test"}, "is for ptb, not for 'c4'"),
        ({"dataset": "wikitext2", "split": "train"}, "reads the test split, got split=train"),
    ],
)
def test_unclear_protocols_are_refused(spec, words):
    with pytest.raises(ConfigError, match=words):
        complete(PerplexitySpec(**spec))


def test_every_protocol_states_what_it_reads():
    for name, protocol in PROTOCOLS.items():
        assert protocol.source, name
        assert set(protocol.datasets) <= set(texts.DATASETS), name
    assert protocols.PROTOCOLS["c4_sampled"].max_windows == protocols.PROTOCOLS["c4_joined"].max_windows == 256


def test_damaged_rows_are_one_line(tmp_path):
    path = tmp_path / "c4.jsonl"
    path.write_text('{"txt": "a"}\n')
    with pytest.raises(ConfigError, match=r"c4\.jsonl: expected UTF-8 rows of allenai/c4"):
        windows_of("c4", str(path), 4, "c4_joined")


def test_hub_texts_are_pinned_by_revision():
    assert text_digest(PerplexitySpec(dataset="wikitext2")).endswith("@b08601e04326c79dfdd32d625aee71d232d685c3")
    other = 40 * "b"
    assert text_digest(PerplexitySpec(dataset="c4", revision=other)) == f"hub:allenai/c4@{other}"


def test_task_words():
    assert requested(("piqa/acc", "boolq/acc", "piqa/acc_norm")) == {"piqa": ["acc", "acc_norm"], "boolq": ["acc"]}
    assert requested(("gsm8k/exact_match:strict-match", "other/acc")) == {
        "gsm8k": ["exact_match:strict-match"],
        "other": ["acc"],
    }


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (("piqa",), "names no metric; say piqa/acc or piqa/acc_norm"),
        (("boolq/acc_norm",), "'boolq' has no metric 'acc_norm'.*known: acc"),
        (("piqa/acc", "piqa/acc"), "given twice"),
    ],
)
def test_bad_task_words_are_refused(tasks, words):
    with pytest.raises(ConfigError, match=words):
        requested(tasks)


def test_task_data_enter_the_identity(tmp_path):
    spec = lambda **more: EvaluationSpec(name="e", tasks=("piqa/acc", "mmlu/acc"), **more)
    pinned = task_digests(spec())
    assert pinned["piqa"] == f"hub:baber/piqa@{TASKS['piqa'].revision}"
    (tmp_path / "piqa.validation.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"no data of task 'mmlu': expected mmlu\.SPLIT\.jsonl"):
        task_digests(spec(data_dir=str(tmp_path)))
    (tmp_path / "mmlu_anatomy.test.jsonl").write_text("{}\n")
    local = task_digests(spec(data_dir=str(tmp_path)))
    (tmp_path / "mmlu_anatomy.test.jsonl").write_text('{"a": 1}\n')
    changed = task_digests(spec(data_dir=str(tmp_path)))
    assert local["piqa"] == changed["piqa"] != pinned["piqa"]
    assert local["mmlu"] != changed["mmlu"]
    with pytest.raises(ConfigError, match="few_shot: 'mmul' is not among the tasks; did you mean 'mmlu'"):
        task_digests(spec(few_shot={"mmul": 5}))


def test_windows_are_int64(documents):
    assert windows_of("c4", documents[1], 40, "c4_sampled").dtype == torch.int64
