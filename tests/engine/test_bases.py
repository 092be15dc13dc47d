"""The pass that computes eigenbases: what is stored, resumed, guarded and shared between cells."""

import time
from types import SimpleNamespace

import pytest
import torch

from ptqbench.engine.bases import Shelf, compute_bases
from ptqbench.errors import ConfigError, NumericalError
from ptqbench.methods import eigenbases
from ptqbench.methods.subspace import Subspace
from ptqbench.models import walk
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.runs.artefacts import Artefacts
from transforms_at_hand import TRANSFORMS, WINDOWS, cell, member, open_model

SHELF = {"model": {"digest": "sha256:1"}, "calibration": {"n_samples": 2}, "seed": 0, "device": "cpu"}


@pytest.mark.parametrize(
    ("label", "n_bases"), [("full_shared", 4 + 1), ("per_layer", 8), ("smoothquant everywhere", 8), ("awq", 2 * 3 * 2)]
)
def test_stored_bases_are_found_resumed_and_guarded(checkpoint, tmp_path, monkeypatch, label, n_bases):
    model, folder = open_model(checkpoint(), torch.float32), tmp_path / "bases"
    transform, done = member(TRANSFORMS[label][0], **TRANSFORMS[label][1]), []
    first = compute_bases(transform, model, WINDOWS, cell(), folder, "mine", done.append)
    everything = {name: first[name] for name in first}
    assert done == [0, 1]
    assert len(first) == n_bases
    (folder / "basis_0001.safetensors").unlink()
    resumed = compute_bases(transform, model, WINDOWS, cell(), folder, "mine")
    assert all(torch.equal(resumed[name], basis) for name, basis in everything.items())
    with pytest.raises(ConfigError, match="belongs to mine, not yours"):
        compute_bases(transform, model, WINDOWS, cell(), folder, "yours")
    monkeypatch.setattr(BlockwiseModel, "reopened", lambda *_: pytest.fail("a finished pass must not run again"))
    compute_bases(transform, model, WINDOWS, cell(), folder, "mine")


@pytest.mark.parametrize("label", ["full_shared", "per_layer", "joint", "joint shared"])
def test_cells_share_moments_and_bases(checkpoint, tmp_path, monkeypatch, label):
    """With another cell's artefacts the same bases come out, to the bit, without running the model."""
    model, shelf = open_model(checkpoint(), torch.float32), lambda: Shelf(Artefacts(tmp_path / "shared"), SHELF)
    name, options = TRANSFORMS[label]
    alone = compute_bases(member(name, **options), model, WINDOWS, cell(), tmp_path / "alone", "alone")
    first, ran = shelf(), []
    compute_bases(
        member("subspace", granularity="one_per_decoder"),
        model,
        WINDOWS,
        cell(),
        tmp_path / "x",
        "x",
        ran.append,
        first,
    )
    assert ran == [0, 1]
    assert first.artefacts.made == 2
    blocks = []
    real = BlockwiseModel.block
    monkeypatch.setattr(BlockwiseModel, "block", lambda self, *a, **k: blocks.append(a) or real(self, *a, **k))
    after = compute_bases(member(name, **options), model, WINDOWS, cell(), tmp_path / "after", "after", shelf=shelf())
    assert not blocks, "another method's moments are enough"
    monkeypatch.setattr(eigenbases, "eigenbases", lambda *_: pytest.fail("the bases are there already"))
    again = member(name, **options, rotation_seed=7, high_bits=6)
    seeded = compute_bases(again, model, WINDOWS, cell(seed=3), tmp_path / "seeded", "seeded", shelf=shelf())
    for found in (after, seeded):
        assert set(found) == set(alone)
        assert all(torch.equal(found[key], alone[key]) for key in alone)


def test_found_bases_cost_what_they_and_their_moments_took(checkpoint, tmp_path, monkeypatch):
    """On a clock of 10 s per block's moments and 1 s per basis: who finds anything is spared the same as who pays for it."""
    now, model = SimpleNamespace(seconds=0.0), open_model(checkpoint(), torch.float32)
    monkeypatch.setattr(
        "ptqbench.runs.artefacts.time", SimpleNamespace(perf_counter=lambda: now.seconds, time=time.time)
    )

    def slow(module, name, seconds):
        real = getattr(module, name)

        def call(*given):
            now.seconds += seconds
            return real(*given)

        monkeypatch.setattr(module, name, call)

    slow(walk, "read_moments", 10)
    slow(eigenbases, "eigenbases", 1)
    slow(Subspace, "solve_model", 1)
    accounts = []
    for number, (label, seed) in enumerate([("full_shared", 0), ("joint", 0), ("joint", 7), ("full_shared", 7)]):
        name, options = TRANSFORMS[label]
        shelf, start = Shelf(Artefacts(tmp_path / "shared"), SHELF), now.seconds
        transform = member(name, **options, rotation_seed=seed)
        compute_bases(transform, model, WINDOWS, cell(), tmp_path / f"{number}", "x", shelf=shelf)
        accounts.append((now.seconds - start, shelf.artefacts.spared_s))
    assert accounts == [(23, 0), (2, 20), (0, 22), (0, 23)]


def test_moments_are_shared_only_where_they_are_the_same(checkpoint, tmp_path):
    model = open_model(checkpoint(), torch.float32)
    made = []
    for number, (key, options) in enumerate(
        [(SHELF, {}), (SHELF, {"center_embedding": True}), (SHELF | {"seed": 1}, {}), (SHELF | {"device": "cuda"}, {})]
    ):
        shelf = Shelf(Artefacts(tmp_path / "shared"), key)
        compute_bases(member("subspace", **options), model, WINDOWS, cell(), tmp_path / f"{number}", "x", shelf=shelf)
        made.append(shelf.artefacts.made)
    assert made == [2, 2, 2, 2]


def test_a_shared_pass_that_was_cut_short_goes_on(checkpoint, tmp_path, monkeypatch):
    """Of a killed pass even a cell whose blocks share one basis keeps the moments."""
    model, options = open_model(checkpoint(), torch.float32), TRANSFORMS["full_shared"][1]
    alone = compute_bases(member("subspace", **options), model, WINDOWS, cell(), tmp_path / "alone", "x")

    def stop(index):
        raise KeyboardInterrupt

    shelf = Shelf(Artefacts(tmp_path / "shared"), SHELF)
    with pytest.raises(KeyboardInterrupt):
        compute_bases(member("subspace", **options), model, WINDOWS, cell(), tmp_path / "cut", "x", stop, shelf)
    assert shelf.artefacts.made == 1
    shelf = Shelf(Artefacts(tmp_path / "shared"), SHELF)
    resumed = compute_bases(member("subspace", **options), model, WINDOWS, cell(), tmp_path / "cut", "x", shelf=shelf)
    assert (shelf.artefacts.found.total(), shelf.artefacts.made) == (1, 1)
    assert all(torch.equal(resumed[key], alone[key]) for key in alone)


def test_a_moment_that_is_not_finite_names_its_block(checkpoint, tmp_path, monkeypatch):
    real = walk.read_moments

    def overflowing(*given):
        moments, leaving = real(*given)
        moments.value[1] = float("inf")
        return moments, leaving

    monkeypatch.setattr(walk, "read_moments", overflowing)
    with pytest.raises(NumericalError, match=r"block 0: .*NaN or infinity"):
        compute_bases(member("subspace"), open_model(checkpoint()), WINDOWS, cell(), tmp_path / "bases", "x")
