"""Every transform with every member of the other roles, as whole cells on small random checkpoints.

``test_conformance.py`` covers each member by itself, ``test_members.py`` target x solver x refine without a transform,
``test_basis.py`` the exactness of transforms. Here whole cells run, from the composed request to the result.
"""

import itertools
import math

import pytest

from ptqbench.cell.folders import group_names
from ptqbench.cell.registry import MEMBERS, create
from ptqbench.cell.spec import ROLES
from ptqbench.results.tables import comparison_sheet, tidy
from ptqbench.run import run_cell
from ptqbench.runs.folder import create as create_folder
from ptqbench.sweeps.compose import compose_cell
from ptqbench.sweeps.resolve import skip_reason

KINDS = (
    ("llama", {}),
    ("qwen2", {"tie_word_embeddings": True, "hidden_size": 64}),
    ("qwen3", {}),
    ("mistral", {"sliding_window": 5}),
    ("smollm3", {"no_rope_layers": [1, 0]}),
    ("phi3", {"hidden_size": 64}),
)
FIXED_KINDS = (("gemma3_text", {"sliding_window": 5}), ("olmo2", {}))
"""Families whose residual stream keeps its basis, because norms stand behind attention and MLP."""
TRANSFORMS = (
    "hadamard", "block_hadamard", "learned_rotation", "subspace_activation", "subspace_activation_per_layer", "subspace_joint",
    "subspace_outlier", "smoothquant", "awq",
)  # fmt: skip
OTHERS = [
    *([f"method/{role}={name}"] for role in ("target", "solver", "refine") for name in MEMBERS[role]
      if name not in ("none", "weight", "gptq")),
    ["method/target=loaq", "method/solver=gptq_act_order", "method/refine=null_space"],
]  # fmt: skip
FEW = ["method.transform.n_samples=4"]
SHORT = {"subspace": FEW, "smoothquant": FEW, "awq": FEW, "learned": ["method.transform.steps=3"]}
PAIRS = [(t, o, *KINDS[i % len(KINDS)]) for i, (t, o) in enumerate(itertools.product(TRANSFORMS, OTHERS))]
PAIRS += [
    (
        "hadamard",
        [*o, "method.transform.r1=none", *(["method.target.level=linear"] if "method/target=loaq" in o else [])],
        *kind,
    )
    for o, kind in itertools.product(OTHERS, FIXED_KINDS)
]


def cell(folder, tmp_path, *words):
    text = tmp_path / "text.txt"
    text.write_text(
        "".join(f"The {a} cat saw {b} red birds near house {a * b}.|" for a in range(20) for b in range(20))
    )
    return compose_cell(
        [
            "model=local", f"model.path={folder}", "calibration=file", f"calibration.path={text}",
            "calibration.separator='|'", "calibration.portion=[0,0.5]", "calibration.n_samples=4", "calibration.seq_len=32",
            "evaluation=file", f"evaluation.texts.file.path={text}", "evaluation.texts.file.separator='|'",
            "evaluation.texts.file.portion=[0.9,1]", "evaluation.texts.file.seq_len=32",
            f"execution.runs_dir={tmp_path / 'runs'}", *words,
        ]
    )  # fmt: skip


def perplexity(spec):
    assert skip_reason(spec) is None
    return run_cell(spec, create_folder(spec))["metrics"]["file/perplexity"]["value"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transform", "others", "kind", "changes"),
    PAIRS,
    ids=["-".join([t, *o, k]).replace("method/", "") for t, o, k, _ in PAIRS],
)
def test_transform_composes_with_every_other_role(checkpoint, tmp_path, transform, others, kind, changes):
    samples = SHORT.get(transform.split("_")[0], [])
    words = ["+method=gptq", f"method/transform={transform}", "bitwidth=w4a4kv4", *samples, *others]
    spec = cell(checkpoint(kind, **changes), tmp_path, *words)
    value = perplexity(spec)
    assert math.isfinite(value)
    folder = create_folder(spec)
    assert folder.result()["bits"]["effective_w_bits"] > 4
    assert {path.name for path in folder.state_path.glob("block_*")} == {
        "block_0000.safetensors",
        "block_0001.safetensors",
    }


SHAPES = [
    ("llama", {"head_dim": 8, "num_key_value_heads": 1, "intermediate_size": 76}),
    ("qwen2", {"hidden_size": 64, "num_key_value_heads": 1, "intermediate_size": 44, "tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 172}),
    ("mistral", {"sliding_window": 5, "intermediate_size": 76}),
    (
        "smollm3",
        {"no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 5, "tie_word_embeddings": True},
    ),
    ("phi3", {"hidden_size": 64, "num_key_value_heads": 1}),
    ("gemma3_text", {"tie_word_embeddings": True, "sliding_window": 5}),
    ("olmo2", {"num_key_value_heads": 1}),
]


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in group_names("method") if name != "fp16"])
@pytest.mark.parametrize(("kind", "changes"), SHAPES, ids=[kind for kind, _ in SHAPES])
def test_every_method_runs_on_every_architecture(checkpoint, tmp_path, method, kind, changes):
    """One KV head, heads of 8, 16 and 256, and FFN widths that need Hadamard factors of 76, 44 and 172."""
    words = [f"+method={method}"]
    spec = cell(checkpoint(kind, **changes), tmp_path, *words)
    short = SHORT.get(spec.method.transform.name.split("_")[0])
    if short:
        spec = cell(checkpoint(kind, **changes), tmp_path, *words, *short)
    if kind in dict(FIXED_KINDS) and skip_reason(spec) is not None:
        # The ways out that the reasons name.
        if spec.method.transform.name != "none":
            words += ["method/transform=hadamard", "method.transform.r1=none"]
        if spec.method.target.name == "loaq":
            words += ["method.target.level=linear"]
        spec = cell(checkpoint(kind, **changes), tmp_path, *words)
    assert math.isfinite(perplexity(spec))


@pytest.mark.slow
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform_at_high_precision_returns_the_unquantized_model(checkpoint, tmp_path, transform):
    """Eight bits everywhere, high part included, stays near the checkpoint: a lost or doubled rotation would not."""
    folder = checkpoint("qwen3", head_dim=16)
    samples = SHORT.get(transform.split("_")[0], [])
    words = ["+method=gptq", f"method/transform={transform}", "bitwidth=w4a8kv8", "bitwidth.w_bits=8", *samples]
    plain = perplexity(cell(folder, tmp_path, "+method=fp16"))
    assert perplexity(cell(folder, tmp_path, *words)) == pytest.approx(plain, rel=0.1)


def test_every_member_is_offered_by_a_file_and_says_what_it_needs():
    for role in ROLES:
        offered = set()
        for name in group_names(f"method/{role}"):
            spec = getattr(compose_cell(["+method=gptq", f"method/{role}={name}"]).method, role)
            member = create(role, spec)
            offered.add(spec.name)
            assert isinstance(member.needs, frozenset)
        assert offered == set(MEMBERS[role])


def test_heads_that_no_hadamard_matrix_mixes_stay_unmixed_and_the_table_says_so(checkpoint, tmp_path):
    folder = checkpoint("llama", hidden_size=56, num_attention_heads=14, num_key_value_heads=2, head_dim=8)
    asked, plain = (
        cell(folder, tmp_path, "+method=quarot", *words) for words in ([], ["method.transform.head_mix=none"])
    )
    assert skip_reason(asked) is None
    assert perplexity(asked) == perplexity(plain)
    result, unmixed = (create_folder(spec).result() for spec in (asked, plain))
    assert result["bits"]["codes_digest"] == unmixed["bits"]["codes_digest"]
    assert unmixed["deviations"] == []
    (said,) = result["deviations"]
    assert "no Hadamard matrix of order 14" in said
    sheet = comparison_sheet(tidy((create_folder(spec), spec) for spec in (asked, plain)))
    assert sheet.notes == [said]
    assert [row[1].note for row in sheet.rows] == [1, None]


def test_learned_factors_compose_into_a_whole_cell(checkpoint, tmp_path):
    words = ["+method=resq", "method.transform.n_samples=4", "method.transform.learned_rotation=true",
             "method.transform.learning_steps=3"]  # fmt: skip
    spec = cell(checkpoint("qwen3"), tmp_path, *words)
    assert math.isfinite(perplexity(spec))
    assert len(list(create_folder(spec).state_path.glob("basis_*"))) == 4  # two blocks, the shared basis, the factors


def test_options_of_grids_and_of_the_loss_reach_the_result(checkpoint, tmp_path):
    """Every one moves the perplexity and the identity of a whole cell."""
    folder, base = checkpoint(), ["+method=rtn", "bitwidth=w3", "bitwidth.group_size=4"]
    options = [
        [], ["method.grid.range_contains_zero=false"], ["method.grid.zero_point=real"], ["evaluation.ppl_dtype=bfloat16"],
        ["bitwidth.a_bits=4"], ["bitwidth.a_bits=4", "method.activation.zero_point=real"],
        ["bitwidth.a_bits=4", "method.activation.group_size=4"], ["method.grid.clip_ratio=0.8"],
    ]  # fmt: skip
    specs = [cell(folder, tmp_path, *base, *words) for words in options]
    assert len({store_path(spec) for spec in specs}) == len(options)
    assert len({perplexity(spec) for spec in specs}) == len(options)
    bits = [create_folder(spec).result()["bits"]["effective_w_bits"] for spec in specs[:3]]
    assert bits == [3 + 19 / 4, 3 + 32 / 4, 3 + 32 / 4]


def store_path(spec):
    return create_folder(spec).path.name


def test_contradictory_grid_options_are_refused():
    from ptqbench.errors import ConfigError

    for words, message in (
        (["method/grid=sym_signed", "method.grid.zero_point=real"], "belong to scheme=asym"),
        (["method/grid=sym_signed", "method.grid.range_contains_zero=false"], "symmetric grids contain zero"),
        (["method/grid=asym_clip", "method.grid.range_contains_zero=false"], "clip_search"),
        (["method/grid=asym_clip", "method.grid.clip_ratio=0.8"], "clip_ratio=0.8 gives; choose one"),
        (["method/activation=symmetric", "method.activation.range_contains_zero=false"], "all are symmetric"),
    ):
        with pytest.raises(ConfigError, match=message):
            compose_cell(["+method=gptq", *words])
