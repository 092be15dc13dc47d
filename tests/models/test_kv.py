"""Keys and values inside live attention: against loops over tokens and heads, and the laws of a plan."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from reference_models import F64, VARIANTS, load, random_tokens, relative, rotation_stack, run
from transformers import AttentionInterface

from ptqbench.errors import ConfigError, UnsupportedError
from ptqbench.models.kv import KvPlan, apply_plan, wrapped_attention
from ptqbench.models.quantized import BlockPlan, install, set_quantizers
from ptqbench.numerics.activation import ActivationGrid, apply_grid, fake_quantize, fake_quantize_tensor

FOUR = ActivationGrid(4)
SPLIT = ActivationGrid(3, high_bits=8, n_high=2)
PLAIN_SPLIT = ActivationGrid(4, range_contains_zero=False, high_bits=8, n_high=1)
UNTOUCHED = ActivationGrid(16, high_bits=16, n_high=1)


def plan_all(model, **kv):
    for block in model.model.layers:
        install(block, BlockPlan(kv=KvPlan(**kv)))
    return model


def qkv(batch=2, n_heads=4, n_kv_heads=2, tokens=5, head_dim=16, dtype=F64, seed=0):
    draws = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, tokens, head_dim) for heads in (n_heads, n_kv_heads, n_kv_heads)]
    return [torch.randn(shape, generator=draws, dtype=F64).to(dtype) for shape in shapes]


def slow_attention(plan, query, key, value, scaling):
    """Write the definition out, one batch row, query head and token at a time: (batch, tokens, H, e)."""
    batch, n_heads, n_tokens, head_dim = query.shape
    n_kv_heads = key.shape[1]
    quantized = plan.key_grid is not None
    rotation = fake_quantize_tensor(plan.rotation, plan.rotation_bits) if quantized else plan.rotation
    used_key, used_value, output = torch.empty_like(key), torch.empty_like(value), torch.empty_like(query)
    for b in range(batch):
        for t in range(n_tokens):
            for k in range(n_kv_heads):
                row = key[b, k, t]
                if quantized:
                    row = fake_quantize(row, plan.rope_output_bits)
                used_key[b, k, t] = row @ rotation[k]
                used_value[b, k, t] = apply_grid(value[b, k, t], plan.value_grid) if plan.value_grid else value[b, k, t]
            if quantized and plan.k_group == "head":
                for k in range(n_kv_heads):
                    used_key[b, k, t] = apply_grid(used_key[b, k, t], plan.key_grid)
            elif quantized:
                for start, stop, bits in plan.key_grid.parts(head_dim):
                    part = used_key[b, :, t, start:stop].clone()
                    used_key[b, :, t, start:stop] = fake_quantize(part.flatten(), bits).reshape(part.shape)
        for h in range(n_heads):
            k = h * n_kv_heads // n_heads
            for t in range(n_tokens):
                row = (
                    fake_quantize(query[b, h, t], plan.rope_output_bits)
                    if plan.key_grid is not None
                    else query[b, h, t]
                )
                scores = torch.stack([(row @ rotation[k]) @ used_key[b, k, s] * scaling for s in range(t + 1)])
                weights = [math.exp(score - scores.max()) for score in scores]
                output[b, h, t] = sum(w / sum(weights) * used_value[b, k, s] for s, w in enumerate(weights))
    return output.transpose(1, 2)


PLANS = {
    "rotation": dict(),
    "head": dict(key_grid=FOUR, value_grid=FOUR),
    "token": dict(key_grid=FOUR, k_group="token"),
    "split": dict(key_grid=SPLIT, value_grid=PLAIN_SPLIT, rotation_bits=8, rope_output_bits=8),
    "split token": dict(key_grid=SPLIT, k_group="token", rotation_bits=4),
    "rope": dict(key_grid=FOUR, rope_output_bits=3),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_attention_equals_loops_over_tokens_and_heads(checkpoint, n_kv_heads, attention):
    model = load(checkpoint(num_key_value_heads=n_kv_heads), attention=attention)
    query, key, value = qkv(n_kv_heads=n_kv_heads)
    causal = torch.full((5, 5), -math.inf, dtype=F64).triu(1)
    tolerance = 1e-6 if attention == "eager" else 1e-12  # eager softmax is float32 whatever the dtype
    for name, settings in PLANS.items():
        plan = KvPlan(rotation=rotation_stack(model), **settings)
        module = install(model.model.layers[0], BlockPlan(kv=plan)).self_attn
        function = AttentionInterface()[model.config._attn_implementation]
        actual, _ = function(module, query, key, value, causal[None, None], scaling=0.25)
        assert relative(actual, slow_attention(plan, query, key, value, 0.25)) < tolerance, name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_without_effect_logits_are_bit_identical(checkpoint, kind, changes, attention):
    tokens = random_tokens(2, 11)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    for dtype in (torch.float32, torch.bfloat16):
        model = load(checkpoint(kind, **changes), dtype, attention)
        expected, padded = run(model, tokens), run(model, tokens, attention_mask=mask)
        plan_all(model, key_grid=UNTOUCHED, value_grid=UNTOUCHED, rotation_bits=8, rope_output_bits=8)
        assert model.config._attn_implementation == f"ptqbench_{attention}"
        assert torch.equal(run(model, tokens), expected)
        assert torch.equal(run(model, tokens, attention_mask=mask), padded)


def test_one_planned_block_leaves_the_others_as_stock(checkpoint):
    model = load(checkpoint(), torch.float32)
    tokens, seen = random_tokens(1, 9), []
    for attention in (block.self_attn for block in model.model.layers):
        attention.register_forward_hook(lambda _, args, output: seen.append(output[0]))
    run(model, tokens)
    install(model.model.layers[1], BlockPlan(kv=KvPlan(key_grid=FOUR)))
    run(model, tokens)
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[1], seen[3])


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_rotation_cancels_and_is_really_applied(checkpoint, kind, changes):
    tokens = random_tokens(2, 12)
    for dtype, tolerance in ((F64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        model = load(checkpoint(kind, **changes), dtype)
        expected, rotation = run(model, tokens), rotation_stack(model)
        plan_all(model, rotation=rotation, rotation_bits=2, rope_output_bits=2)
        assert 0 < relative(run(model, tokens), expected) < tolerance
        quantized = run(plan_all(model, rotation=rotation, key_grid=FOUR), tokens)
        assert not torch.equal(quantized, run(plan_all(model, key_grid=FOUR), tokens))


def test_rotation_rounding_acts_only_while_keys_are_quantized(checkpoint):
    tokens, model = random_tokens(1, 9), load(checkpoint())
    rotation = rotation_stack(model)
    exact = run(plan_all(model, rotation=rotation), tokens)
    coarse = dict(rotation=rotation, rotation_bits=3, rope_output_bits=3)
    assert torch.equal(run(plan_all(model, **coarse), tokens), exact)
    plan_all(model, **coarse, value_grid=FOUR)
    assert torch.equal(run(model, tokens), run(plan_all(model, rotation=rotation, value_grid=FOUR), tokens))
    sharp = run(plan_all(model, rotation=rotation, key_grid=ActivationGrid(15)), tokens)
    for field in ("rotation_bits", "rope_output_bits"):
        plan_all(model, rotation=rotation, key_grid=ActivationGrid(15), **{field: 3})
        assert relative(run(model, tokens), exact) > 10 * relative(sharp, exact)
        set_quantizers(model, False)
        assert torch.equal(run(model, tokens), exact)


@pytest.mark.parametrize("part", ["key_grid", "value_grid"])
def test_error_shrinks_with_bits_and_switches_off(checkpoint, part):
    tokens, model = random_tokens(2, 12), load(checkpoint("qwen3"))
    expected = run(model, tokens)
    errors = [
        relative(run(plan_all(model, **{part: ActivationGrid(bits)}), tokens), expected) for bits in (2, 4, 6, 8, 12)
    ]
    assert all(coarse > 2 * fine > 0 for coarse, fine in pairwise(errors)), errors
    set_quantizers(model, False)
    assert torch.equal(run(model, tokens), expected)
    set_quantizers(model, True)
    assert relative(run(model, tokens), expected) == errors[-1]


def test_every_token_and_head_has_its_own_grid():
    query, key, value = qkv(n_kv_heads=3, n_heads=6)
    rotation = torch.linalg.qr(torch.randn(3, 16, 16, dtype=F64, generator=torch.Generator().manual_seed(3)))[0]
    plan = KvPlan(rotation, SPLIT, PLAIN_SPLIT, rotation_bits=8, rope_output_bits=8)
    whole = apply_plan(plan, query, key, value)
    for b in range(2):
        for t in range(5):
            token = apply_plan(plan, *(x[b : b + 1, :, t : t + 1] for x in (query, key, value)))
            for one, many in zip(token, whole, strict=True):
                torch.testing.assert_close(one[0, :, 0], many[b, :, t], rtol=0, atol=1e-12)
    key[:, 0, 1] *= 100
    for k_group, untouched in (("head", True), ("token", False)):
        changed = KvPlan(key_grid=SPLIT, k_group=k_group)
        before = apply_plan(changed, *qkv(n_kv_heads=3, n_heads=6))[1]
        after = apply_plan(changed, query, key, value)[1]
        assert torch.equal(before[:, 1:, 1], after[:, 1:, 1]) == untouched
        assert torch.equal(before[:, :, 2:], after[:, :, 2:])


def test_one_head_makes_both_key_groups_equal_and_more_heads_do_not(checkpoint):
    tokens = random_tokens(1, 9)
    for n_kv_heads in (1, 2):
        model = load(checkpoint(num_key_value_heads=n_kv_heads))
        per_head = run(plan_all(model, key_grid=SPLIT), tokens)
        per_token = run(plan_all(model, key_grid=SPLIT, k_group="token"), tokens)
        assert torch.equal(per_head, per_token) == (n_kv_heads == 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_value_grid_equals_quantizing_the_output_of_v_proj(checkpoint, attention):
    folder, tokens = checkpoint("qwen2"), random_tokens(2, 9)
    actual = run(plan_all(load(folder, torch.float32, attention), value_grid=PLAIN_SPLIT), tokens)
    model = load(folder, torch.float32, attention)
    for block in model.model.layers:
        block.self_attn.v_proj.register_forward_hook(
            lambda _, args, output: apply_grid(output, PLAIN_SPLIT, n_groups=2)
        )
    assert torch.equal(actual, run(model, tokens))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("kind", "changes"), VARIANTS[:2] + VARIANTS[3:5])
def test_cached_decoding_equals_one_forward(checkpoint, kind, changes, attention):
    model = load(checkpoint(kind, **changes), attention=attention)
    plan_all(
        model,
        rotation=rotation_stack(model),
        key_grid=SPLIT,
        value_grid=PLAIN_SPLIT,
        rotation_bits=8,
        rope_output_bits=8,
    )
    tokens, pieces, cache = random_tokens(2, 12), [], None
    full = run(model, tokens)
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 10), (10, 11), (11, 12)):
        with torch.no_grad():
            output = model(tokens[:, start:stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=0, atol=1e-5)
    set_quantizers(model, False)
    assert relative(run(model, tokens), full) > 1e-3, "the plan had no effect"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generate_equals_manual_greedy_decoding(checkpoint, attention):
    model = load(checkpoint("qwen3"), attention=attention)
    plan_all(model, rotation=rotation_stack(model), key_grid=FOUR, value_grid=FOUR)
    model.generation_config.eos_token_id = None
    tokens = random_tokens(2, 6)
    written = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    for _ in range(6):
        tokens = torch.cat([tokens, run(model, tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, tokens)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("kind", "changes"), VARIANTS[:1] + VARIANTS[3:5])
def test_left_padded_row_equals_its_unpadded_forward(checkpoint, kind, changes, attention):
    # Stock eager attention yields NaN for fully masked rows in float64: its mask overflows the float32 softmax.
    dtype, tolerance = (F64, 1e-8) if attention == "sdpa" else (torch.float32, 5e-3)
    model = load(checkpoint(kind, **changes), dtype, attention)
    plan_all(model, rotation=rotation_stack(model), key_grid=ActivationGrid(8), value_grid=ActivationGrid(8))
    tokens = random_tokens(2, 10)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    alone = run(model, tokens[:1, 4:])[0]
    padded = run(model, tokens, attention_mask=mask, position_ids=positions)
    assert relative(padded[0, 4:], alone) < tolerance
    assert relative(padded[1], run(model, tokens[1:])[0]) < tolerance
    assert relative(run(model, tokens, position_ids=positions)[0, 4:], alone) > 10 * tolerance


@pytest.mark.parametrize("head_dim", [8, 16, 64, 256])
def test_half_precision_stays_close_to_single(checkpoint, head_dim):
    folder, tokens = checkpoint(head_dim=head_dim), random_tokens(2, 12)
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = load(folder, dtype)
        grid = ActivationGrid(8, high_bits=10, n_high=head_dim // 8)
        plan_all(model, rotation=rotation_stack(model), key_grid=grid, value_grid=grid, rotation_bits=8)
        logits[dtype] = run(model, tokens)
        assert logits[dtype].dtype == dtype
    assert 0 < relative(logits[torch.bfloat16], logits[torch.float32]) < 0.1


def test_inputs_are_not_modified():
    inputs = qkv(dtype=torch.bfloat16)
    before = copy.deepcopy(inputs)
    rotation = torch.eye(16).expand(2, 16, 16)
    apply_plan(KvPlan(rotation, FOUR, FOUR, rotation_bits=8, rope_output_bits=8, k_group="token"), *inputs)
    assert all(torch.equal(now, then) for now, then in zip(inputs, before, strict=True))


def test_names_of_wrapped_functions():
    assert [wrapped_attention(name) for name in ("sdpa", "eager", None)] == [
        "ptqbench_sdpa",
        "ptqbench_eager",
        "ptqbench_eager",
    ]
    assert wrapped_attention("ptqbench_sdpa") == "ptqbench_sdpa"
    with pytest.raises(UnsupportedError, match="flash_attention_2"):
        wrapped_attention("flash_attention_2")


def test_switching_back_to_a_stock_function_is_refused_unless_the_plan_is_gone(checkpoint):
    model, tokens = load(checkpoint(), torch.float32), random_tokens(1, 5)
    expected = run(model, tokens)
    plan_all(model, key_grid=FOUR)
    quantized = run(model, tokens)
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedError, match="ignores it"):
        run(model, tokens)
    model.set_attn_implementation(wrapped_attention("sdpa"))
    assert torch.equal(run(model, tokens), quantized)
    assert torch.equal(run(copy.deepcopy(model), tokens), quantized)
    for block in model.model.layers:
        install(block, BlockPlan())
    model.set_attn_implementation("sdpa")
    assert torch.equal(run(model, tokens), expected)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (dict(k_group="batch"), "k_group"),
        (dict(rotation_bits=1), "rotation_bits"),
        (dict(rope_output_bits=17), "rope_output_bits"),
        (dict(rotation=torch.eye(16)), "key rotation of shape"),
        (dict(key_grid=ActivationGrid(4, high_bits=8, n_high=17)), "at least 17 channels"),
    ],
)
def test_impossible_plans_are_refused(checkpoint, plan, message):
    model = load(checkpoint(), torch.float32)
    with pytest.raises(ConfigError, match=message):
        plan_all(model, **plan)
    assert model.config._attn_implementation == "sdpa"
