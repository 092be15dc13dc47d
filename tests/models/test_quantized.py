"""Live blocks with prepared inputs and changing bases: exactness without quantizers, cancellation, and locality."""

import copy
from itertools import pairwise

import pytest
import torch
from reference_models import F64, VARIANTS, load, random_tokens, relative, rotation_stack, run
from torch import nn

from ptqbench.errors import ConfigError, UnsupportedError
from ptqbench.models.architecture import ATTENTION_INPUT, ATTENTION_OUTPUT, MLP_INPUT, MLP_OUTPUT
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.fuse import part_order
from ptqbench.models.quantized import (
    BasisChange,
    BlockPlan,
    InputPlan,
    KvPlan,
    PlannedLayer,
    QuantizedLinear,
    ResidualChange,
    install,
    set_quantizers,
)
from ptqbench.models.source import ModelSource
from ptqbench.models.stages import finish, forward, staged
from ptqbench.numerics.activation import ActivationGrid, apply_grid
from ptqbench.numerics.hadamard import hadamard_transform
from ptqbench.numerics.orthogonal import generator, haar, mix_heads, rotate_input, rotate_output

LINEARS = (*ATTENTION_INPUT, *ATTENTION_OUTPUT, *MLP_INPUT, *MLP_OUTPUT)
FOUR = ActivationGrid(4)
SPLIT = ActivationGrid(4, high_bits=8, n_high=6)
GROUPED = ActivationGrid(4, range_contains_zero=False, high_bits=8, n_high=2)
DOWN, OUT = "mlp.down_proj", "self_attn.o_proj"


def on_all_blocks(model, plan):
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = install(block, plan)
    return model


def fuse(linear, change):
    linear.weight = nn.Parameter(change(linear.weight), requires_grad=False)


def random_matrices(model, seed=0):
    draws = generator(seed, "bases")
    return [haar(model.config.hidden_size, draws) for _ in range(2 * len(model.model.layers) + 1)]


def rotate_per_layer(model, bases, grid=None):
    """Give the input of every norm its own basis and cancel all of them in the weights (``per_layer`` fusion)."""
    model.lm_head.weight = nn.Parameter(rotate_input(model.lm_head.weight, bases[-1]), requires_grad=False)
    embedding = model.model.embed_tokens
    embedding.weight = nn.Parameter(rotate_input(embedding.weight, bases[0]), requires_grad=False)
    for index, block in enumerate(model.model.layers):
        before, between, after = bases[2 * index : 2 * index + 3]
        for names, entering, leaving in ((ATTENTION_INPUT, before, None), (MLP_INPUT, between, None),
                                         (ATTENTION_OUTPUT, None, between), (MLP_OUTPUT, None, after)):  # fmt: skip
            for linear in (block.get_submodule(name) for name in names):
                if entering is not None:
                    fuse(linear, lambda weight, t=entering: rotate_input(weight, t))
                else:
                    fuse(linear, lambda weight, t=leaving: rotate_output(weight, t))
                    if linear.bias is not None:
                        linear.bias = nn.Parameter(rotate_output(linear.bias, leaving), requires_grad=False)
        changes = (BasisChange(before.T @ between, grid), BasisChange(between.T @ after, grid))
        model.model.layers[index] = install(block, BlockPlan(basis_changes=changes))
    return model


# Linears


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_untouched_linears_are_bit_identical_and_keep_their_parameters(checkpoint, kind, changes):
    tokens = random_tokens(2, 9)
    for dtype in (torch.float32, torch.bfloat16):
        model = load(checkpoint(kind, **changes), dtype)
        expected, parameters, state = run(model, tokens), dict(model.named_parameters()), model.state_dict()
        plans = (InputPlan(), InputPlan(grid=ActivationGrid(16)))
        on_all_blocks(model, BlockPlan({name: plans[i % 2] for i, name in enumerate(LINEARS)}))
        assert isinstance(model.model.layers[0].get_submodule(DOWN), QuantizedLinear)
        assert torch.equal(run(model, tokens), expected)
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        assert list(model.state_dict()) == list(state)


@pytest.mark.parametrize(("kind", "changes"), [*VARIANTS, ("llama", {"intermediate_size": 96})])
def test_online_transform_cancels_in_the_fused_weight_and_only_there(checkpoint, kind, changes):
    model, tokens = load(checkpoint(kind, **changes)), random_tokens(2, 9)
    expected = run(model, tokens)
    on_all_blocks(model, BlockPlan({DOWN: InputPlan(online=hadamard_transform)}))
    assert relative(run(model, tokens), expected) > 1e-2
    for block in model.model.layers:
        fuse(block.get_submodule(DOWN), hadamard_transform)
    assert relative(run(model, tokens), expected) < 1e-12


def test_head_mixing_and_reorder_cancel_in_permuted_columns(checkpoint):
    model, tokens = load(checkpoint("qwen3", head_dim=8)), random_tokens(2, 9)
    expected, order = run(model, tokens), part_order(4, (5, 3))
    on_all_blocks(model, BlockPlan({OUT: InputPlan(online=lambda x: mix_heads(x, 4), order=order)}))
    for block in model.model.layers:
        fuse(block.get_submodule(OUT), lambda weight: mix_heads(weight, 4))
    assert relative(run(model, tokens), expected) > 1e-2
    for block in model.model.layers:
        fuse(block.get_submodule(OUT), lambda weight: weight[:, order])
    assert relative(run(model, tokens), expected) < 1e-12


def test_prepare_transforms_then_quantizes_in_head_layout_then_reorders(checkpoint):
    block = load(checkpoint("qwen2")).model.layers[0]
    order, x = part_order(4, (10, 2)), torch.randn(2, 5, 48, dtype=F64)
    plan = InputPlan(online=lambda x: mix_heads(x, 4), grid=GROUPED, n_groups=4, order=order)
    linear = install(block, BlockPlan({OUT: plan})).get_submodule(OUT)
    expected = torch.empty_like(x)
    for b in range(2):
        for t in range(5):
            mixed = mix_heads(x[b, t], 4)
            expected[b, t] = torch.cat([apply_grid(mixed[12 * h : 12 * h + 12], GROUPED) for h in range(4)])[order]
    assert relative(linear.prepare(x), expected) < 1e-12
    assert torch.equal(linear(x), nn.functional.linear(linear.prepare(x), linear.weight, linear.bias))
    set_quantizers(block, False)
    assert torch.equal(linear.prepare(x), mix_heads(x, 4)[..., order])
    set_quantizers(block, True)
    assert relative(linear.prepare(x), expected) < 1e-12


def test_an_assigned_weight_takes_effect_and_the_input_is_not_modified(checkpoint):
    block = load(checkpoint("qwen2")).model.layers[0]
    x = torch.randn(3, 48, dtype=F64)
    before = x.clone()
    linear = install(block, BlockPlan({"self_attn.q_proj": InputPlan(grid=SPLIT)})).get_submodule("self_attn.q_proj")
    old = linear(x)
    linear.weight = nn.Parameter(2 * linear.weight)
    torch.testing.assert_close(linear(x) - linear.bias, 2 * (old - linear.bias))
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", LINEARS)
def test_error_shrinks_with_bits_and_switches_off(checkpoint, name):
    model, tokens = load(checkpoint("qwen2")), random_tokens(2, 12)
    expected, errors = run(model, tokens), []
    for bits in (2, 4, 6, 8, 12):
        on_all_blocks(model, BlockPlan({name: InputPlan(grid=ActivationGrid(bits))}))
        errors.append(relative(run(model, tokens), expected))
    assert all(coarse > 2 * fine > 0 for coarse, fine in pairwise(errors)), errors
    set_quantizers(model, False)
    assert torch.equal(run(model, tokens), expected)


def test_tokens_and_heads_are_quantized_independently(checkpoint):
    block = load(checkpoint()).model.layers[0]
    plan = InputPlan(grid=GROUPED, n_groups=4)
    linear = install(block, BlockPlan({OUT: plan})).get_submodule(OUT)
    x = torch.randn(2, 5, 64, dtype=F64)
    whole = linear.prepare(x)
    assert torch.equal(whole, torch.stack([torch.stack([linear.prepare(token) for token in row]) for row in x]))
    x[:, 2, :16] *= 100
    changed = linear.prepare(x)
    assert torch.equal(changed[:, 2, 16:], whole[:, 2, 16:])
    assert torch.equal(changed[:, 3:], whole[:, 3:])
    assert not torch.equal(changed[:, 2, :16], whole[:, 2, :16])


# Basis changes


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("kind", "changes"), [*VARIANTS[:2], *VARIANTS[3:]])
def test_basis_changes_cancel_in_fused_weights(checkpoint, kind, changes, attention):
    model, tokens = load(checkpoint(kind, **changes), attention=attention, unit_gain=True), random_tokens(2, 10)
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0  # on the right: no row is fully masked
    expected, masked = run(model, tokens), run(model, tokens, attention_mask=mask)
    rotate_per_layer(model, random_matrices(model))
    tolerance = 1e-12 if attention == "sdpa" else 1e-6  # eager softmax is float32 whatever the dtype
    assert 0 < relative(run(model, tokens), expected) < tolerance
    assert relative(run(model, tokens, attention_mask=mask), masked) < tolerance
    first = model.model.layers[0].basis_changes[0]
    first.matrix = torch.eye(48, dtype=F64)
    assert relative(run(model, tokens), expected) > 1e-2


def test_a_changed_layer_equals_its_definition_and_norms_see_the_unquantized_stream(checkpoint):
    block, hidden = load(checkpoint()).model.layers[0], torch.randn(2, 6, 48, dtype=F64)
    rope = (torch.ones(1, 6, 16, dtype=F64), torch.zeros(1, 6, 16, dtype=F64))
    one, two = (haar(48, generator(i, "basis")) for i in range(2))
    for plan in ((BasisChange(one, FOUR), BasisChange(two, SPLIT)), (None, BasisChange(two)), (BasisChange(one), None)):
        stock = copy.deepcopy(block)
        planned = install(block, BlockPlan(basis_changes=plan))
        branch = [
            (lambda h: h) if c is None else (lambda h, c=c: (apply_grid(h, c.grid) if c.grid else h) @ c.matrix)
            for c in plan
        ]
        mixed, _ = stock.self_attn(stock.input_layernorm(hidden), position_embeddings=rope, attention_mask=None)
        middle = branch[0](hidden) + mixed
        expected = branch[1](middle) + stock.mlp(stock.post_attention_layernorm(middle))
        assert relative(planned(hidden, position_embeddings=rope, attention_mask=None), expected) < 1e-14
        assert [change is None for change in planned.basis_changes] == [change is None for change in plan]


def test_a_stored_basis_change_has_a_grid_per_output_channel_and_switches_off():
    matrix, hidden = haar(48, generator(0, "basis")), torch.randn(3, 48, dtype=F64)
    change = ResidualChange(BasisChange(matrix, matrix_bits=8), torch.empty(0, dtype=F64))
    scales = matrix.abs().amax(0) / 127
    torch.testing.assert_close(change(hidden), hidden @ (torch.round(matrix / scales) * scales), rtol=0, atol=1e-12)
    assert relative(change(hidden), hidden @ matrix) > 1e-3
    change.enabled = False
    assert torch.equal(change(hidden), hidden @ matrix)
    exact = ResidualChange(BasisChange(matrix), torch.empty(0, dtype=F64))
    assert exact.rounded is None
    assert torch.equal(exact(hidden), hidden @ matrix)


def test_basis_quantizers_switch_off_and_matrices_stay(checkpoint):
    model, tokens = load(checkpoint("qwen3"), unit_gain=True), random_tokens(2, 10)
    expected, bases, errors = run(model, tokens), random_matrices(model), []
    for bits in (4, 8, 12):
        rotated = rotate_per_layer(copy.deepcopy(model), bases, ActivationGrid(bits))
        errors.append(relative(run(rotated, tokens), expected))
        set_quantizers(rotated, False)
        assert relative(run(rotated, tokens), expected) < 1e-12
    assert all(coarse > 4 * fine > 1e-8 for coarse, fine in pairwise(errors)), errors


def test_cached_decoding_and_generation_with_everything_on(checkpoint):
    model, tokens = load(checkpoint("qwen3"), unit_gain=True), random_tokens(2, 8)
    plain = run(model, tokens)
    rotate_per_layer(model, random_matrices(model), ActivationGrid(8))
    changes = [
        tuple(BasisChange(change.matrix, change.grid) for change in block.basis_changes) for block in model.model.layers
    ]
    kv = KvPlan(rotation_stack(model), FOUR, FOUR)
    inputs = {name: InputPlan(grid=FOUR) for name in LINEARS}
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = install(block, BlockPlan(inputs, kv, changes[index]))
    full, pieces, cache = run(model, tokens), [], None
    assert relative(full, plain) > 1e-2
    for token in tokens.split(1, dim=1):
        with torch.no_grad():
            output = model(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=0, atol=1e-5)
    model.generation_config.eos_token_id = None
    written = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    for _ in range(4):
        tokens = torch.cat([tokens, run(model, tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, tokens)
    set_quantizers(model, False)
    assert relative(run(model, random_tokens(2, 8)), plain) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_layer_serves_its_parent_like_the_stock_layer(checkpoint, dtype):
    model, tokens = load(checkpoint("qwen3"), dtype), random_tokens(1, 7)
    stock, expected = type(model.model.layers[0]), run(model, tokens)
    states = model(tokens, output_hidden_states=True).hidden_states
    eye = (BasisChange(torch.eye(48, dtype=F64)), BasisChange(torch.eye(48, dtype=F64)))
    on_all_blocks(model, BlockPlan(basis_changes=eye))
    planned = model.model.layers[0]
    assert isinstance(planned, PlannedLayer)
    assert isinstance(planned, stock)
    assert planned.basis_changes[0].matrix.dtype == dtype
    assert torch.equal(run(model, tokens), expected)
    recorded = model(tokens, output_hidden_states=True).hidden_states
    assert all(torch.equal(now, then) for now, then in zip(recorded, states, strict=True))
    assert torch.equal(run(copy.deepcopy(model), tokens), expected)
    assert not any("basis" in name for name in model.state_dict())
    assert planned.get_submodule("self_attn.q_proj") is planned.self_attn.q_proj


# Plans


def test_a_new_plan_replaces_the_old_one_and_an_empty_one_restores_the_stock_block(checkpoint):
    model, tokens = load(checkpoint(attention_bias=True), torch.float32), random_tokens(1, 7)
    expected, kinds = run(model, tokens), [type(module) for module in model.modules()]
    everything = BlockPlan(
        {name: InputPlan(grid=FOUR) for name in LINEARS},
        KvPlan(key_grid=FOUR),
        (BasisChange(torch.eye(48), FOUR), None),
    )
    quantized = run(on_all_blocks(model, everything), tokens)
    assert torch.equal(run(on_all_blocks(model, everything), tokens), quantized)
    names, parameters = list(model.state_dict()), dict(model.named_parameters())
    on_all_blocks(model, BlockPlan())
    assert [type(module) for module in model.modules()] == kinds
    assert list(model.state_dict()) == names
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert torch.equal(run(model, tokens), expected)
    assert not torch.equal(quantized, expected)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (BlockPlan({"mlp.out_proj": InputPlan()}), "mlp.out_proj"),
        (BlockPlan({OUT: InputPlan(n_groups=5)}), "n_groups that divides 64"),
        (BlockPlan({OUT: InputPlan(grid=ActivationGrid(4, high_bits=8, n_high=17), n_groups=4)}), "at least 17"),
        (BlockPlan({OUT: InputPlan(order=torch.arange(63))}), "permutation of 64"),
        (BlockPlan({OUT: InputPlan(order=torch.zeros(64, dtype=torch.int64))}), "permutation of 64"),
        (BlockPlan({OUT: InputPlan(order=torch.arange(64.0))}), "permutation of 64"),
        (BlockPlan(basis_changes=(None, BasisChange(torch.eye(47)))), "basis change 2"),
        (BlockPlan({OUT: InputPlan()}, KvPlan(rotation=torch.eye(16)[None])), "key rotation"),
    ],
)
def test_impossible_plans_are_refused_and_change_nothing(checkpoint, plan, message):
    block = load(checkpoint(), torch.float32).model.layers[0]
    modules = dict(block.named_modules())
    with pytest.raises(ConfigError, match=message):
        install(block, plan)
    assert dict(block.named_modules()) == modules


def test_a_dispatched_block_cannot_change_its_basis(checkpoint):
    block = load(checkpoint(), torch.float32).model.layers[0]
    block.forward = block.forward
    with pytest.raises(UnsupportedError, match="install first"):
        install(block, BlockPlan(basis_changes=(BasisChange(torch.eye(48)), None)))


# Block by block


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_streamed_and_staged_blocks_equal_the_whole_installed_model(checkpoint, kind):
    folder, tokens = checkpoint(kind), random_tokens(2, 9)
    whole = load(folder, torch.float32)
    rotation = rotation_stack(whole)
    width = whole.model.layers[0].get_submodule(OUT).in_features
    plan = BlockPlan(
        {name: InputPlan(grid=SPLIT) for name in LINEARS}
        | {
            DOWN: InputPlan(online=hadamard_transform, grid=FOUR),
            OUT: InputPlan(grid=FOUR, order=torch.arange(width).flip(0)),
        },
        KvPlan(rotation, FOUR, FOUR),
        (BasisChange(haar(48, generator(1, "basis")), ActivationGrid(8)), BasisChange(haar(48, generator(2, "basis")))),
    )
    expected = run(on_all_blocks(whole, plan), tokens)
    model = BlockwiseModel(ModelSource(folder), torch.float32, torch.device("cpu"))
    with torch.no_grad():
        hidden, positions = model.embed(tokens), model.positions(9)
        for index in range(model.n_blocks):
            for _ in range(2):  # a second visit replaces the first one's plan
                with model.block(index, lambda _, block: install(block, plan)) as block:
                    output = forward(block, hidden, positions)
                    assert torch.equal(finish(staged(block, hidden, positions)), output)
            hidden = output
        with model.head() as head:
            assert torch.equal(head(hidden), expected)


def test_a_streamed_block_may_change_its_basis_in_an_overlay(checkpoint):
    folder, hidden = checkpoint(), torch.randn(1, 5, 48)
    model = BlockwiseModel(ModelSource(folder), torch.float32, torch.device("cpu"))
    positions = model.positions(5)
    negative = BlockPlan(basis_changes=(BasisChange(-torch.eye(48)), BasisChange(-torch.eye(48))))
    with torch.no_grad():
        with model.block(0) as block:
            stock = forward(block, hidden, positions)
        with model.block(0, lambda _, block: install(block, negative)) as block:
            assert not torch.allclose(forward(block, hidden, positions), stock)
        with model.block(0, lambda _, block: install(block, BlockPlan())) as block:
            assert torch.equal(forward(block, hidden, positions), stock)
