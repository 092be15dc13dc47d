"""Bits of keys and values by block: measured on the model, installed block by block, recorded, and part of the identity."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from given_windows import GivenWindows
from ptqbench.cell.fingerprint import run_id
from ptqbench.cell.labels import bits_name, says_other_bits
from ptqbench.cell.spec import BitwidthSpec, build
from ptqbench.engine.bases import StoredBases
from ptqbench.engine.kv_bits import KV_PART, distribute
from ptqbench.engine.rotations import Preparation
from ptqbench.errors import ConfigError
from ptqbench.methods.transform import KV_BITS
from ptqbench.numerics.bits import allocate
from ptqbench.runs.attempt import Silent
from transforms_at_hand import SHAPE, WINDOWS, cell, in_basis, logits, member, open_model


def measured(measure, k=4, v=4, choices=(2, 3, 4, 6, 8), **others):
    spec = cell(16, 16, k, v, **others)
    return dataclasses.replace(
        spec, bitwidth=dataclasses.replace(spec.bitwidth, kv_measure=measure, kv_choices=choices)
    )


def bits_of(model, spec, folder):
    stored = StoredBases(folder, "test", model.device)
    distribute(model, spec, stored, lambda: WINDOWS, Silent())
    return stored[KV_BITS].tolist()


def sizes_of(folder, measure):
    """Sizes K_0 V_0 K_1 V_1 from the installed model: norms of its weights, or of what its cache holds."""
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if measure == "activation":
        with torch.no_grad():
            cache = whole(WINDOWS, use_cache=True).past_key_values
        held = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        return [float(part.double().pow(2).sum(-1).mean().sqrt()) for part in held]
    attention = [layer.self_attn for layer in whole.model.layers]
    weights = [proj.weight.detach().double() for one in attention for proj in (one.k_proj, one.v_proj)]
    values = [torch.linalg.svdvals(weight) for weight in weights]
    return [float(one.max() if measure == "weight_spec" else one.norm()) for one in values]


@pytest.mark.parametrize("measure", ["activation", "weight_fro", "weight_spec"])
@pytest.mark.parametrize(("kind", "changes"), [("llama", {}), ("qwen3", {"head_dim": 32}), ("qwen2", {})])
def test_sizes_are_those_of_the_installed_model(checkpoint, tmp_path, measure, kind, changes):
    folder = checkpoint(kind, **changes)
    expected = allocate(sizes_of(folder, measure), 16, (2, 3, 4, 6, 8))
    found = bits_of(open_model(folder, torch.float32), measured(measure), tmp_path / "bits")
    assert [bits for block in found for bits in block] == expected


def test_every_block_quantizes_with_its_own_bits_and_the_mean_is_stored():
    bases = {KV_BITS: torch.tensor([[6, 2], [4, 3]])}
    spec = measured("activation")
    for name, options in (
        ("none", {}), ("none", {"r3": True}), ("hadamard", {}), ("block_hadamard", {}), ("smoothquant", {}), ("awq", {}),
    ):  # fmt: skip
        basis = member(name, **options).basis(spec, SHAPE, bases)
        plans = [basis.plan(index).kv for index in range(2)]
        assert [(plan.key_grid.bits, plan.value_grid.bits) for plan in plans] == [(6, 2), (4, 3)]
        assert [plan.rotation is not None for plan in plans] == [name == "hadamard" or "r3" in options] * 2
    precision = member("none").precision(spec, SHAPE, bases)
    overhead = 32 / SHAPE.head_dim
    stored = precision.storage_bits()
    assert (stored.k_bits, stored.v_bits) == (5 + overhead, 2.5 + overhead)
    assert precision.unused() == ["keys and values take 3.75 of 4 bits: no further step of kv_choices fits"]
    assert member("none").precision(cell(), SHAPE).unused() == []


def test_a_basis_without_the_bits_of_its_blocks_is_refused():
    with pytest.raises(ConfigError, match="distribute them first"):
        member("none").basis(measured("activation"), SHAPE)


def test_equal_bits_everywhere_are_the_cell_without_a_measure(checkpoint, tmp_path):
    """With one choice every tensor has the same bits, and the model is the same to the bit."""
    model = open_model(checkpoint("qwen2"), torch.float32)
    plain = in_basis(model, member("none"), cell(16, 16, 4, 4), tmp_path / "plain")
    chosen = in_basis(model, member("none"), measured("activation", choices=(4,)), tmp_path / "chosen")
    assert torch.equal(logits(chosen), logits(plain))
    spread = in_basis(model, member("none"), measured("activation", 3, 3), tmp_path / "spread")
    assert not torch.equal(logits(spread), logits(plain))


def test_a_rotation_of_keys_does_not_move_the_measure_but_a_scale_does(checkpoint, tmp_path):
    """It measures the basis, not the function: keys times c and queries over c compute the same."""
    folder = checkpoint("llama", num_key_value_heads=4)
    spec, model = measured("activation", 3, 3), open_model(folder, torch.float32)
    plain = bits_of(model, spec, tmp_path / "plain")
    prepared = {
        name: Preparation(model, spec, tmp_path / name, "test", Silent(), GivenWindows(WINDOWS)).of(member(name))
        for name in ("none", "hadamard")
    }
    assert all(stored[KV_BITS].tolist() == plain for stored in prepared.values())
    scaled = open_model(folder, torch.float32)
    tensors = scaled.tensors

    def larger(index):
        held = dict(tensors(index))
        held["self_attn.v_proj.weight"] = 1e3 * held["self_attn.v_proj.weight"]
        return held

    scaled.tensors = larger
    weights = measured("weight_fro", 3, 3)
    assert bits_of(scaled, weights, tmp_path / "scaled") != bits_of(model, weights, tmp_path / "as it is")


def test_bits_are_found_where_they_are_stored(checkpoint, tmp_path, monkeypatch):
    model, spec = open_model(checkpoint(), torch.float32), measured("activation")
    preparation = Preparation(model, spec, tmp_path / "x", "test", Silent(), GivenWindows(WINDOWS))
    first = preparation.of(member("none"))[KV_BITS]
    monkeypatch.setattr("ptqbench.engine.rotations.distribute", lambda *_: pytest.fail("they are stored"))
    assert torch.equal(preparation.of(member("none"))[KV_BITS], first)
    assert KV_PART == "kv"


def test_a_measure_is_part_of_identity_and_names_and_subspaces_refuse_it():
    specs = [
        cell(16, 16, 4, 4),
        measured("activation"),
        measured("weight_fro"),
        measured("activation", choices=(2, 4, 8)),
    ]
    assert len({run_id(spec) for spec in specs}) == 4
    assert [bits_name(spec.bitwidth) for spec in specs] == [
        "w16kv4", "w16kv4_activation", "w16kv4_weight_fro", "w16kv4_activation_2_4_8"
    ]  # fmt: skip
    named = dataclasses.replace(specs[1].bitwidth, name="w16kv4")
    assert says_other_bits(named), "a name of uniform bits is not that of distributed ones"
    assert "kv_measure" in member("subspace").skip_reason(measured("activation"), SHAPE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_choices": [2, 4]}, "no effect without"),
        ({"kv_measure": "activation", "kv_choices": [4, 2]}, "ascending"),
        ({"kv_measure": "activation", "kv_choices": []}, "ascending"),
        ({"kv_measure": "activation", "kv_choices": [2, 16]}, "below 16"),
        ({"kv_measure": "activation", "k_bits": 16}, "around the mean"),
        ({"kv_measure": "activation", "k_bits": 2, "v_bits": 2, "kv_choices": [3, 4]}, "around the mean"),
        ({"kv_measure": "size"}, "kv_measure"),
    ],
)
def test_impossible_choices_are_refused(changes, words):
    bits = {"name": "b", "w_bits": 16, "a_bits": 16, "k_bits": 4, "v_bits": 4}
    with pytest.raises(ConfigError, match=words):
        build(BitwidthSpec, bits | changes)
