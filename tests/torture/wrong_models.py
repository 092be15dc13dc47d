"""Checkpoints, texts and tasks that cannot be what they claim to be."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
from pathlib import Path
from random import Random
from typing import Any

from torture.requests import Place, Request

STORY = "Once upon a time there was a {} cat that saw {} birds near the house. "
REFUSED, FAILED_OR_REFUSED = (2,), (1, 2)


def _text(place: Place, name: str = "text.txt") -> Path:
    return place.write(name, "".join(STORY.format(a, b) for a in ("red", "small", "sad") for b in range(150)))


def _model(place: Place) -> Path:
    from ptqbench.models.source import embedded_model_folder

    folder = place.here / "model"
    shutil.copytree(embedded_model_folder("tiny"), folder)
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder


def _request(
    place: Place, title: str, model: Path, calibration: Path, evaluation: Path, status: tuple[int, ...], *more: str
) -> Request:
    words = [
        "+method=rtn", "bitwidth=w3", "model=local", f"model.path='{model}'", "calibration=file",
        f"calibration.path='{calibration}'",
        "calibration.seq_len=32", "calibration.n_samples=4", "evaluation=file", f"evaluation.texts.file.path='{evaluation}'",
        "evaluation.texts.file.seq_len=64", f"execution.runs_dir='{place.here / 'new'}'", "execution.progress=false",
        "execution.threads=1", *more,
    ]  # fmt: skip
    return Request(title, words, status=status)


DELETE = object()
CONFIG: dict[str, list[Any]] = {
    "model_type": ["gpt2", "mixtral", "", 7, None, DELETE, ["llama"], "LLAMA"],
    "hidden_size": [0, -1, 127, 64, "128", 1.5, None, DELETE, 10**9, [128], True],
    "intermediate_size": [0, -1, 256, "128", None, DELETE, 1.5],
    "num_hidden_layers": [0, -1, 5, "4", 1.5, None, DELETE, 10**6, [4]],
    "num_attention_heads": [0, -1, 3, "4", None, DELETE, 1000],
    "num_key_value_heads": [0, -1, 3, "2", 8, 1.5],
    "head_dim": [0, -1, 31, "32", 1.5, 10**6],
    "vocab_size": [0, -1, 1000, "1024", None, DELETE, 1.5, 10**9],
    "rms_norm_eps": ["x", None, -1, [1], True],
    "hidden_act": ["gelu", "nosuch", 7, None, "relu"],
    "rope_parameters": [7, "x", [], {"rope_type": "nosuch", "rope_theta": 1e4}, {"rope_type": "default", "rope_theta": "x"},
    {"rope_type": "default", "rope_theta": -1}],
    "max_position_embeddings": [0, -1, "x", 1.5],
    "attention_bias": [True, "x", 7],
    "mlp_bias": [True, "x"],
    "quantization_config": [{"quant_method": "gptq"}, {"quant_method": "nosuch"}, {}, "x"],
    "compression_config": [{"quant_method": "compressed-tensors"}],
    "architectures": [["GPT2LMHeadModel"]],
    "auto_map": [{"AutoModelForCausalLM": "modeling.X"}],
}  # fmt: skip
WHOLE_CONFIG: dict[str, bytes] = {
    "empty": b"", "cut off": b'{"model_type": "lla', "a list": b"[]", "a number": b"7", "null": b"null", "empty mapping": b"{}",
    "not UTF-8": b'{"model_type": "\xff\xfe"}', "nested deep": b'{"a":' * 2000 + b"1" + b"}" * 2000, "zeros": b"\0" * 100,
    "NaN": b'{"model_type": "llama", "hidden_size": NaN}',
}  # fmt: skip


def config(draw: Random, place: Place) -> Request:
    """A config.json that does not describe the checkpoint."""
    model, text = _model(place), _text(place)
    path = model / "config.json"
    if draw.random() < 0.25:
        title = draw.choice([*WHOLE_CONFIG, "missing", "a folder"])
        path.unlink()
        if title == "a folder":
            path.mkdir()
        elif title != "missing":
            path.write_bytes(WHOLE_CONFIG[title])
    else:
        key = draw.choice(list(CONFIG))
        new = draw.choice(CONFIG[key])
        data = json.loads(path.read_text())
        if new is DELETE:
            del data[key]
        else:
            data[key] = new
        title = f"{key}: {'removed' if new is DELETE else json.dumps(new)}"
        path.write_text(json.dumps(data))
    return _request(place, f"config.json {title}", model, text, text, REFUSED)


def weights(draw: Random, place: Place) -> Request:
    """A safetensors file (or an index, or something else) that does not hold the weights."""
    model, text = _model(place), _text(place)
    path = model / "model.safetensors"
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    shape = header[name]["shape"]

    def packed(changed: dict[str, Any], rest: bytes = body) -> bytes:
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + rest

    def changed(**values: Any) -> bytes:
        return packed(header | {name: header[name] | values})

    begin, end = header[name]["data_offsets"]
    hole = struct.pack("<f", float("nan")) + body[begin + 4 : end]
    ways: dict[str, Any] = {
        "empty": lambda: b"",
        "seven bytes": lambda: data[:7],
        "cut off": lambda: data[: draw.randint(9, len(data) - 1)],
        "header length too large": lambda: struct.pack("<Q", 2**62) + data[8:],
        "header length zero": lambda: struct.pack("<Q", 0) + data[8:],
        "header is no JSON": lambda: struct.pack("<Q", 10) + b"not a json" + body,
        "header is a list": lambda: struct.pack("<Q", 2) + b"[]" + body,
        "a tensor missing": lambda: packed({k: v for k, v in header.items() if k != name}),
        "a tensor renamed": lambda: packed({k + "x" * (k == name): v for k, v in header.items()}),
        "unknown dtype": lambda: changed(dtype="F7"),
        "integer dtype": lambda: changed(dtype=draw.choice(("I32", "U32"))),
        "a dtype that cannot be": lambda: _cast(data, [name] if draw.random() < 0.5 else names, draw.choice(SMALL)),
        "a shape of other size": lambda: changed(shape=[*shape[:-1], shape[-1] + 1]),
        "a negative shape": lambda: changed(shape=[-1]),
        "a flat shape": lambda: changed(shape=[(end - begin) // 4, 1]),
        "offsets outside": lambda: changed(data_offsets=[end, end + end]),
        "offsets reversed": lambda: changed(data_offsets=[end, begin]),
        "random bytes": lambda: os.urandom(5000),
        "a git-lfs pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 2105784\n",
        "an HTML page": lambda: b"<html><body>404</body></html>" * 20,
        "NaN in a tensor": lambda: packed(header, body[:begin] + hole + body[end:]),
    }  # fmt: skip
    others = (
        "missing",
        "only .bin",
        "a folder",
        "an index without shards",
        "an index outside",
        "an index cut off",
        "an index of a list",
        "an adapter beside",
        "link to nothing",
    )
    title = draw.choice([*ways, *others])
    status = FAILED_OR_REFUSED if title == "NaN in a tensor" else REFUSED
    if title in ways:
        path.write_bytes(ways[title]())
    else:
        _other_weights(title, model, path, names)
    return _request(place, f"model.safetensors: {title} ({name})", model, text, text, status)


SMALL = ("float8_e4m3fn", "float8_e5m2", "int8", "uint8", "bool", "complex64", "int32")


def _cast(data: bytes, names: list[str], dtype: str) -> bytes:
    """The checkpoint with some tensors of another type, as other tools store quantized ones."""
    import torch
    from safetensors.torch import load, save

    tensors = load(data)
    changed = {
        name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items() if name in names and tensor.ndim == 2
    }
    return save(tensors | (changed or {names[0]: tensors[names[0]].to(getattr(torch, dtype))}), {"format": "pt"})


def _other_weights(title: str, model: Path, path: Path, names: list[str]) -> None:
    index = model / "model.safetensors.index.json"
    if title == "an adapter beside":
        (model / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
        shutil.copy(path, model / "adapter_model.safetensors")
        return
    path.unlink()
    if title == "only .bin":
        (model / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + os.urandom(200))
    elif title == "a folder":
        path.mkdir()
    elif title == "an index without shards":
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}))
    elif title == "an index outside":
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../../../etc/passwd")}))
    elif title == "an index cut off":
        index.write_text('{"weight_map": {"lm_he')
    elif title == "an index of a list":
        index.write_text('{"weight_map": [1, 2]}')
    elif title == "link to nothing":
        path.symlink_to("/no/such/blob")


def tokenizer(draw: Random, place: Place) -> Request:
    """Tokenizer files that are damaged or of another model."""
    model, text = _model(place), _text(place)
    path, settings = model / "tokenizer.json", model / "tokenizer_config.json"
    data = json.loads(path.read_text())

    def large() -> bytes:
        vocab = data["model"]["vocab"]
        last = max(vocab, key=vocab.get)
        return json.dumps(data | {"model": data["model"] | {"vocab": vocab | {last: 5_000_000}}}).encode()

    ways: dict[str, Any] = {
        "empty": lambda: b"", "cut off": lambda: path.read_bytes()[: draw.randint(1, 50000)], "empty mapping": lambda: b"{}",
        "a list": lambda: b"[]", "null": lambda: b"null", "not UTF-8": lambda: b"\xff\xfe" * 500,
        "random bytes": lambda: os.urandom(3000),
        "no model": lambda: json.dumps({k: v for k, v in data.items() if k != "model"}).encode(),
        "unknown model type": lambda: json.dumps(data | {"model": data["model"] | {"type": "Nosuch"}}).encode(),
        "empty vocabulary": lambda: json.dumps(data | {"model": data["model"] | {"vocab": {}, "merges": []}}).encode(),
        "an id beyond the embedding": large,
    }  # fmt: skip
    configs = {
        "class that is not there": '{"tokenizer_class": "NosuchTokenizer"}',
        "config cut off": '{"tokenizer_cl',
        "config a list": "[]",
    }
    title = draw.choice([*ways, "missing", "a folder", "only tokenizer.model", *configs])
    status = (0, *FAILED_OR_REFUSED) if title in ("class that is not there", "an id beyond the embedding") else REFUSED
    if title in configs:
        settings.write_text(configs[title])
    else:
        content = ways[title]() if title in ways else b""
        path.unlink()
        if title in ways:
            path.write_bytes(content)
        elif title == "a folder":
            path.mkdir()
        elif title == "only tokenizer.model":
            (model / "tokenizer.model").write_bytes(os.urandom(500))
    return _request(place, f"tokenizer: {title}", model, text, text, status)


def text(draw: Random, place: Place) -> Request:
    """A text that is none, is too short, or cannot be read to its end."""
    sound, path = _text(place), place.here / "bad.txt"
    story = sound.read_bytes()
    ways: dict[str, Any] = {
        "empty": b"", "white space": b" \n\t" * 500, "one word": b"Once",
        "not UTF-8": story[:3000] + b"\xff\xfe\xfa" + story[3000:],
        "UTF-16": story.decode().encode("utf-16"), "binary": bytes(range(256)) * 100,
        "Latin-1": ("Größe é " * 2000).encode("latin-1"),
        "zip": b"PK\x03\x04" + os.urandom(9000), "gzip under another name": gzip.compress(story),
    }  # fmt: skip
    others = ("missing", "a folder", "a pipe", "a device without an end", "link to nothing", "link to itself")
    title = draw.choice([*ways, *others])
    if title in ways:
        path.write_bytes(ways[title])
    elif title == "a folder":
        path.mkdir()
    elif title == "a pipe":
        os.mkfifo(path)
    elif title == "a device without an end":
        path = Path("/dev/zero")
    elif title.startswith("link"):
        path.symlink_to(path if title == "link to itself" else "/no/such/text")
    role = draw.choice(("calibration", "evaluation"))
    calibration, evaluation = (path, sound) if role == "calibration" else (sound, path)
    method = ("+method=gptq",)  # reads its calibration, which rounding to nearest alone might not
    request = _request(place, f"{role} text: {title}", _model(place), calibration, evaluation, REFUSED)
    request.words[0] = method[0]
    return request


LINE = {
    "question": "What is it?",
    "choices": {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]},
    "answerKey": "A",
    "id": "1",
}


def task(draw: Random, place: Place) -> Request:
    """A task that is not there, or whose data is damaged."""
    folder = place.here / "tasks"
    folder.mkdir()
    good = "\n".join(json.dumps(LINE | {"id": str(n)}) for n in range(20)).encode() + b"\n"
    ways: dict[str, bytes | None] = {
        "empty": b"", "cut off": good[:-40], "not JSON": b"question: x\n" * 9, "not UTF-8": good.replace(b"What", b"\xff\xfe"),
        "a list per line": b"[1, 2]\n" * 9, "a number per line": b"7\n" * 9, "null per line": b"null\n" * 9,
        "fields missing": b'{"id": "1"}\n' * 9,
        "choices a word": good.replace(b'{"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]}', b'"abcd"'),
        "answer that is no choice": good.replace(b'"answerKey": "A"', b'"answerKey": "Z"'), "no file": None,
    }  # fmt: skip
    title = draw.choice(
        [*ways, "misspelled", "no metric", "unknown metric", "data folder missing", "data folder a file", "twice"]
    )
    content, tasks, where, status = ways.get(title), "arc_easy/acc", folder, FAILED_OR_REFUSED
    if content is not None:
        (folder / "arc_easy.test.jsonl").write_bytes(content)
    elif title not in ("no file",):
        (folder / "arc_easy.test.jsonl").write_bytes(good)
        status = REFUSED
    tasks = {
        "misspelled": "arc_esy/acc",
        "no metric": "arc_easy",
        "unknown metric": "arc_easy/accc",
        "twice": "arc_easy/acc,arc_easy/acc",
    }.get(title, tasks)
    where = {"data folder missing": place.here / "nosuch", "data folder a file": folder / "arc_easy.test.jsonl"}.get(
        title, folder
    )
    if title == "twice":
        status = (0, 2)
    model, sound = _model(place), _text(place)
    return _request(
        place,
        f"task: {title}",
        model,
        sound,
        sound,
        status,
        f"evaluation.tasks=[{tasks}]",
        f"evaluation.data_dir='{where}'",
    )
