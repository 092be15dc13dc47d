"""What the tests of transforms share: cells, members by name, models opened in a basis, and the transforms worth trying."""

import torch

from given_windows import GivenWindows
from ptqbench.cell.registry import create
from ptqbench.cell.spec import RoleSpec, RunSpec, build
from ptqbench.engine.rotations import Preparation
from ptqbench.models.architecture import Architecture
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.quantized import set_quantizers
from ptqbench.models.source import ModelSource
from ptqbench.models.stages import forward
from ptqbench.runs.attempt import Silent

OFF = {"r1": "none", "r2": False, "r3": False, "r4": False, "head_mix": "none"}
TRANSFORMS = {
    "keys alone": ("none", {"r3": True, "output_group": "head"}),
    "folding": ("hadamard", OFF),
    "r1": ("hadamard", OFF | {"r1": "random_hadamard"}),
    "r1 haar": ("hadamard", OFF | {"r1": "haar"}),
    "r1 bare": ("hadamard", OFF | {"r1": "hadamard"}),
    "r2": ("hadamard", OFF | {"r2": True}),
    "r3": ("hadamard", OFF | {"r3": True}),
    "r4": ("hadamard", OFF | {"r4": True}),
    "head mixing": ("hadamard", OFF | {"head_mix": "hadamard"}),
    "quarot": ("hadamard", {}),
    "blocks": ("block_hadamard", {"block": 16}),
    "stream untouched": ("hadamard", {"r1": "none"}),
    "full_shared": ("subspace", {}),
    "one_per_decoder": ("subspace", {"granularity": "one_per_decoder"}),
    "per_layer": ("subspace", {"granularity": "per_layer"}),
    "iso": ("subspace", {"iso_bits": True, "high_bits": 6}),
    "joint": ("subspace", {"objective": "joint", "granularity": "per_layer"}),
    "joint shared": ("subspace", {"objective": "joint", "kv_joint": True}),
    "joint per block": ("subspace", {"objective": "joint", "granularity": "one_per_decoder"}),
    "outlier": ("subspace", {"objective": "outlier", "granularity": "per_layer"}),
    "output per token": ("subspace", {"output_group": "token"}),
    "smoothquant": ("smoothquant", {}),
    "smoothquant everywhere": ("smoothquant", {"alpha": 0.3, "pairs": ["qkv", "o", "gate_up", "down"]}),
    "awq": ("awq", {"clip": False}),
    "awq from moments": ("awq", {"clip": False, "o": "per_kv_head", "module_loss": False}),
    "learned": ("learned_rotation", {"steps": 2, "init": "haar", "r3": False}),
    "learned inside the parts": ("subspace", {"learned_rotation": True, "learning_steps": 2}),
    "joint everywhere": (
        "subspace",
        {"objective": "joint", "granularity": "per_layer", "kv_joint": True, "pre_fuse_compensation": True},
    ),
}
TOKENS = torch.randint(0, 100, (2, 24), generator=torch.Generator().manual_seed(1))
WINDOWS = torch.randint(0, 100, (4, 32), generator=torch.Generator().manual_seed(2))
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
           "mlp.down_proj")  # fmt: skip
SHAPE = Architecture(
    hidden_size=48, n_blocks=2, n_heads=4, n_kv_heads=2, head_dim=16, intermediate_size=76, vocab_size=9,
    tied_embeddings=False, qkv_bias=False, qk_norm=False,
)  # fmt: skip


def cell(w=4, a=4, k=4, v=4, solver="gptq", seed=0, weight_groups=None, grid=None, **activation):
    role = lambda name: {"name": name, "options": {}}
    return build(RunSpec, {
        "model": {"name": "m"},
        "method": {
            "name": "m", "transform": role("none"), "target": role("weight"), "solver": role(solver),
            "refine": role("none"), "grid": grid or {"scheme": "sym_signed", "clip_search": True}, "activation": activation,
            "true_sequential": True,
        },
        "bitwidth": {"name": "b", "w_bits": w, "a_bits": a, "k_bits": k, "v_bits": v, "group_size": weight_groups},
        "calibration": None, "evaluation": {"name": "e"}, "seed": seed,
    })  # fmt: skip


def member(name, **options):
    return create("transform", RoleSpec(name, options))


def open_model(folder, dtype=torch.float64):
    return BlockwiseModel(ModelSource(folder), dtype, torch.device("cpu"))


def in_basis(model, transform, spec, folder):
    """Open a model in the basis of a transform; eigenbases are computed in ``folder``."""
    bases = Preparation(model, spec, folder, "test", Silent(), GivenWindows(WINDOWS)).of(transform)
    return model.reopened(transform.basis(spec, model.architecture, bases))


@torch.no_grad()
def logits(model, quantizers=True):
    hidden, positions = model.embed(TOKENS), model.positions(TOKENS.shape[1])
    for index in range(model.n_blocks):
        with model.block(index) as block:
            set_quantizers(block, quantizers)
            hidden = forward(block, hidden, positions)
    with model.head() as head:
        return head(hidden)


def ranges(precision, name):
    return [(part.start, part.stop, part.spec.bits) for part in precision.weight_grid(name)]


def shape(**changes):
    return Architecture(**(vars(SHAPE) | changes))
