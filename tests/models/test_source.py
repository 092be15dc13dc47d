"""The identity of a checkpoint: the files that it covers, when they are hashed again, and the cache of digests."""

import dataclasses
import io
import os
import shutil

import pytest
from reference_models import verify

from ptqbench.cell.spec import ModelSpec
from ptqbench.errors import ConfigError
from ptqbench.models import source
from ptqbench.models.source import digest, embedded_model_folder, file_digest, locate

TINY = "sha256:e2c0538b4de12b28540b43b41bce4d815bc211829b03899355e8190752fb0d5f"


@pytest.fixture
def tiny(tmp_path):
    """A copy of the embedded model that can be changed."""
    folder = tmp_path / "tiny"
    shutil.copytree(embedded_model_folder("tiny"), folder)
    return folder


def pinned(folder):
    spec = ModelSpec(name="local", path=str(folder))
    return dataclasses.replace(spec, digest=digest(spec))


def test_digest_of_a_folder_is_the_one_it_always_had(tiny):
    assert digest(ModelSpec(name="tiny")) == pinned(tiny).digest == TINY


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.4.0.0.json", "vocab.json", "vocab.txt", "merges.txt",
     "special_tokens_map.json", "added_tokens.json", "tekken.json", "config.json"],
)  # fmt: skip
def test_every_file_of_model_and_tokenizer_is_verified(tiny, name):
    spec = pinned(tiny)
    verify(spec)
    text = (tiny / name).read_text() if (tiny / name).exists() else "{}"
    (tiny / name).write_text(text + "\n")
    with pytest.raises(ConfigError, match="has changed since the cell was composed"):
        verify(spec)


def test_other_files_are_not_part_of_the_identity(tiny):
    spec = pinned(tiny)
    for name in ("README.md", "chat_template.jinja", "generation_config.json", "training.json"):
        (tiny / name).write_text("something else")
    verify(spec)


def test_weights_are_verified(tiny):
    spec = pinned(tiny)
    weights = bytearray((tiny / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tiny / "model.safetensors").write_bytes(weights)
    with pytest.raises(ConfigError, match="has changed"):
        verify(spec)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"])
def test_unreadable_file_is_named(tiny, name, monkeypatch):
    spec, plain = pinned(tiny), io.open

    def refuse(path, *arguments, **named):
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *arguments, **named)

    monkeypatch.setattr("io.open", refuse)
    with pytest.raises(ConfigError, match=f"{name} cannot be read: Permission denied"):
        verify(spec)


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file whose digest is remembered, and a list of what was hashed."""
    path, hashed, plain = tmp_path / "large", [], source._hash
    path.write_bytes(b"first")
    monkeypatch.setattr(source, "ALWAYS_HASHED_BYTES", 1)
    monkeypatch.setenv("PTQBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(source, "_hash", lambda path: hashed.append(path) or plain(path))
    return path, hashed


def test_large_files_are_hashed_once(large):
    path, hashed = large
    assert file_digest(path) == file_digest(path)
    assert len(hashed) == 1


@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_file_of_the_same_size_and_time_is_hashed_again(large, how):
    path, _ = large
    first, stat = file_digest(path), path.stat()
    target = path if how == "in place" else path.with_name("other")
    target.write_bytes(b"other")
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    target.replace(path)
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert file_digest(path) != first


@pytest.mark.parametrize("damage", ["unwritable", "not a digest"])
def test_digest_cache_may_be_unusable(large, damage):
    path, _ = large
    cache = path.parent / "cache"
    if damage == "unwritable":
        cache.write_text("a file where a folder belongs")
    expected = file_digest(path)
    if damage == "not a digest":
        for entry in (cache / "digests").iterdir():
            entry.write_text("")
    assert file_digest(path) == expected


COMMITS = "1" * 40, "2" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch, checkpoint):
    """A hub repository with two commits in the cache; ``main`` names the first until it is moved."""
    repository = tmp_path / "hub" / "models--some--model"
    made = checkpoint()
    for commit in COMMITS:
        shutil.copytree(made, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMITS[0])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository


def test_hub_model_is_read_at_the_commit_of_its_digest(hub):
    spec = ModelSpec(name="some", hub_id="some/model")
    spec = dataclasses.replace(spec, digest=digest(spec))
    assert spec.digest == f"hub:some/model@{COMMITS[0]}"
    (hub / "refs" / "main").write_text(COMMITS[1])
    assert locate(spec).folder.name == COMMITS[0]
    verify(spec)
    assert digest(dataclasses.replace(spec, digest=None)).endswith(COMMITS[1])


def test_hub_model_of_another_repository_is_refused(hub):
    spec = ModelSpec(name="some", hub_id="some/model", digest=f"hub:other/model@{COMMITS[0]}")
    with pytest.raises(ConfigError, match="expected hub:other/model"):
        verify(spec)
