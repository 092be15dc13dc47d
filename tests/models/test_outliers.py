"""Laws of the function-preserving outlier channels."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ptqbench.errors import ConfigError, UnsupportedError
from ptqbench.models.family import FAMILIES
from ptqbench.models.outliers import outlier_channels, rescale_block


@pytest.fixture
def model() -> LlamaForCausalLM:
    """Two random blocks with uneven norm gains."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
    )
    built = LlamaForCausalLM(config).eval()
    for name, parameter in built.named_parameters():
        if "norm" in name:
            parameter.data = 0.5 + torch.rand_like(parameter)
    return built


def rescale(state: dict[str, torch.Tensor], channels: list[int], factor: float) -> dict[str, torch.Tensor]:
    """Rescale every block of a state dict."""
    result = dict(state)
    for prefix in ("model.layers.0.", "model.layers.1."):
        block = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        result |= {prefix + name: tensor for name, tensor in rescale_block(block, 32, channels, factor).items()}
    return result


def inputs_of_linears(model: LlamaForCausalLM, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the inputs (tokens, channels) of every linear that follows a norm, and of every block."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2)))
        for name, module in model.named_modules()
        if name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")) or name.split(".")[-1].isdigit()
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


def spread(inputs: torch.Tensor) -> float:
    """Return the ratio of the largest to the median channel RMS."""
    rms = inputs.square().mean(0).sqrt()
    return (rms.max() / rms.median()).item()


def rescaled(model: LlamaForCausalLM, channels: list[int], factor: float) -> LlamaForCausalLM:
    """Return a second model with rescaled gains."""
    other = LlamaForCausalLM(model.config).eval()
    other.load_state_dict(rescale(model.state_dict(), channels, factor))
    return other


def folded(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Multiply the gains of the blocks' norms into the linears behind them, in float64."""
    result = {}
    for block in range(2):
        for norm, linears in FAMILIES["llama"].readers.items():
            gain = state[f"model.layers.{block}.{norm}.weight"].double()
            for linear in linears:
                result[f"{block}.{linear}"] = state[f"model.layers.{block}.{linear}.weight"].double() * gain
    return result


@pytest.mark.parametrize("factor", [30.0, 0.1, 8.0])
def test_function_is_unchanged(model: LlamaForCausalLM, factor: float) -> None:
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = model(tokens).logits
        got = rescaled(model, outlier_channels(32), factor)(tokens).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


def test_power_of_two_is_exact_in_every_weight(model: LlamaForCausalLM) -> None:
    there = rescale(model.state_dict(), [3, 7], 16.0)
    back = rescale(there, [3, 7], 1 / 16.0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(back[name], tensor), name


def test_exactly_the_chosen_channels_grow(model: LlamaForCausalLM) -> None:
    tokens, channels = torch.arange(40).view(2, 20), outlier_channels(32)
    before = inputs_of_linears(model, tokens)
    after = inputs_of_linears(rescaled(model, channels, 30.0), tokens)
    expected = torch.ones(32)
    expected[channels] = 30.0
    for name in before:
        scale = torch.ones(32) if name.split(".")[-1].isdigit() else expected
        torch.testing.assert_close(after[name], before[name] * scale, rtol=2e-3, atol=1e-3)
        if not name.split(".")[-1].isdigit():
            assert spread(after[name]) > 5 * spread(before[name]), name


def test_folding_the_gains_cancels_it(model: LlamaForCausalLM) -> None:
    double = {name: tensor.double() for name, tensor in model.state_dict().items()}
    plain = folded(double)
    changed = folded(rescale(double, outlier_channels(32), 30.0))
    for name, weight in plain.items():
        torch.testing.assert_close(changed[name], weight, rtol=1e-14, atol=0.0)
    assert len(plain) == 10


def test_input_is_not_modified_and_other_weights_are_shared(model: LlamaForCausalLM) -> None:
    state = model.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    after = rescale(state, [1], 30.0)
    assert all(torch.equal(state[name], before[name]) for name in before)
    changed = {name for name in state if after[name] is not state[name]}
    assert len(changed) == 2 * 7
    assert not any("down_proj" in name or "o_proj" in name or "embed" in name for name in changed)
    assert all(after[name].dtype == state[name].dtype for name in state)


def test_channels_are_seeded_and_different() -> None:
    assert outlier_channels(128) == outlier_channels(128) == sorted(set(outlier_channels(128)))
    assert len(outlier_channels(128)) == 4
    assert outlier_channels(128, seed=1) != outlier_channels(128, seed=2)
    assert outlier_channels(128, 0) == []


def test_errors_name_what_is_wrong(model: LlamaForCausalLM) -> None:
    state = model.state_dict()
    with pytest.raises(ConfigError, match="32"):
        rescale(state, [32], 30.0)
    with pytest.raises(ConfigError, match="factor"):
        rescale(state, [1], 0.0)
    with pytest.raises(ConfigError, match="129"):
        outlier_channels(128, 129)
    del state["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(UnsupportedError, match=r"mlp\.up_proj"):
        rescale(state, [1], 30.0)
