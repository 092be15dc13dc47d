"""Transforms that a model or the other options rule out, with the reason, and the ways out."""

import re

import pytest

from ptqbench.errors import ConfigError, UnsupportedError
from ptqbench.methods.targets import Loaq
from transforms_at_hand import SHAPE, cell, member, shape


@pytest.mark.parametrize(
    ("name", "options", "changes", "words"),
    [
        ("hadamard", {}, {"head_dim": 24}, r"r2 and r3.*24"),
        ("hadamard", {"r2": False}, {"head_dim": 24}, r"r2 and r3.*24"),
        ("hadamard", {}, {"intermediate_size": 90}, r"r4.*90"),
        ("hadamard", {"odd_hadamard": "table"}, {"intermediate_size": 4864}, r"r4.*4864"),
        ("hadamard", {}, {"hidden_size": 50}, r"r1=random_hadamard.*50"),
        ("subspace", {}, {"intermediate_size": 90}, r"down_proj.*90"),
        ("subspace", {"objective": "outlier"}, {}, "only with granularity=per_layer"),
    ],
)
def test_impossible_cells_are_skipped_with_a_reason(name, options, changes, words):
    reason = member(name, **options).skip_reason(cell(), shape(**changes))
    assert reason is not None
    assert re.search(words, reason), reason
    assert member(name, **{k: v for k, v in options.items() if k == "r2"}).skip_reason(cell(), SHAPE) is None


def test_ways_out_of_a_skipped_cell():
    assert member("hadamard").skip_reason(cell(), shape(n_heads=14)) is None, "its heads are left unmixed"
    assert member("hadamard", r2=False, r3=False).skip_reason(cell(), shape(head_dim=24)) is None
    assert member("hadamard", r2=False).skip_reason(cell(k=16), shape(head_dim=24)) is None, "r3 needs quantized keys"
    assert member("hadamard", r1="haar").skip_reason(cell(), shape(hidden_size=50)) is None
    assert member("hadamard", r4=False).skip_reason(cell(), shape(intermediate_size=90)) is None


@pytest.mark.parametrize("kind", ["gemma3_text", "olmo2"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("hadamard", {}), ("hadamard", {"r1": "haar"}), ("learned_rotation", {}), ("subspace", {}),
     ("subspace", {"granularity": "per_layer"}), ("subspace", {"objective": "outlier", "granularity": "per_layer"})],
)  # fmt: skip
def test_a_stream_that_is_written_through_norms_keeps_its_basis(kind, name, options):
    """The reason names the norm that stands against it, what would have to change, and the way out, which works."""
    reason = member(name, **options).skip_reason(cell(), shape(model_type=kind))
    assert re.search(rf"{kind} has a norm \(post_attention_layernorm\).*online behind that norm.*none", reason), reason
    for way_out in (member("none"), member("hadamard", r1="none")):
        assert way_out.skip_reason(cell(), shape(model_type=kind)) is None


@pytest.mark.parametrize("kind", ["gemma3_text", "olmo2"])
def test_a_target_behind_the_stream_needs_linears_that_write_it(kind):
    loaq, written = Loaq(), shape(model_type=kind)
    assert re.search(r"level=rms.*post_attention_layernorm.*level=linear", loaq.skip_reason(cell(), written))
    assert "level=sublayer" in Loaq(level="sublayer").skip_reason(cell(), written)
    assert Loaq(level="linear").skip_reason(cell(), written) is None
    assert Loaq(alpha=0, beta=0).skip_reason(cell(), written) is None
    assert loaq.skip_reason(cell(), shape(model_type="phi3")) is None


def test_four_bits_stand_in_where_the_joint_objective_would_vanish():
    joint = member("subspace", objective="joint", granularity="per_layer")
    for bits in ((16, 16, 4, 4), (16, 4), (4, 16)):
        assert joint.skip_reason(cell(*bits), SHAPE) is None
    assert [joint.low_bits(cell(*bits)) for bits in ((16, 16, 4, 4), (16, 3), (2, 16))] == [4, 3, 2]


def test_iso_bits_are_for_four_bits():
    iso = member("subspace", iso_bits=True, high_bits=6)
    assert "iso_bits" in iso.skip_reason(cell(3), SHAPE)
    assert iso.skip_reason(cell(4, 16, 4, 16), SHAPE) is None


def test_a_high_part_without_channels_is_an_error():
    with pytest.raises(UnsupportedError, match=r"int\(0\.125 \* 4\) = 0"):
        member("subspace").skip_reason(cell(), shape(head_dim=4))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_joint": True}, "objective=joint"),
        ({"pre_fuse_compensation": True}, "objective=joint"),
        ({"pre_fuse_compensation": True, "objective": "joint"}, "granularity=per_layer"),
        ({"iso_bits": True}, "high_bits=6"),
        ({"iso_bits": True, "high_bits": 6, "granularity": "per_layer"}, "full_shared"),
        ({"high_fraction": 1.5}, "high_fraction"),
        ({"n_samples": 0}, "n_samples"),
        ({"rank": 3}, "unknown key"),
        ({"learned_rotation": True, "granularity": "per_layer"}, "granularity=full_shared"),
        ({"learned_rotation": True, "objective": "outlier"}, "objective=activation"),
    ],
)
def test_contradictory_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        member("subspace", **options)


def test_eigenbases_are_asked_for():
    with pytest.raises(ConfigError, match="compute_bases"):
        member("subspace").basis(cell(), SHAPE)
