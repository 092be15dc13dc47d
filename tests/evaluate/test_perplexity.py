"""Perplexity against an obviously correct implementation."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from ptqbench.errors import NumericalError
from ptqbench.evaluate import perplexity as module
from ptqbench.evaluate.perplexity import perplexity
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.source import ModelSource


def open_model(folder):
    return BlockwiseModel(ModelSource(folder), torch.float32, torch.device("cpu"))


def slow_perplexity(folder, windows):
    """Token by token, in float64, from the whole installed model."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    total = count = 0
    for window in windows:
        with torch.no_grad():
            logits = model(window[None]).logits[0].double()
        for position in range(len(window) - 1):
            scores = logits[position]
            total -= float(scores[window[position + 1]] - torch.logsumexp(scores, 0))
            count += 1
    return math.exp(total / count)


@pytest.mark.parametrize(("kind", "changes"), [("llama", {}), ("qwen2", {"tie_word_embeddings": True}), ("qwen3", {})])
def test_equals_the_slow_implementation(checkpoint, monkeypatch, kind, changes):
    folder = checkpoint(kind, **changes)
    windows = torch.randint(0, 100, (5, 20), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 3000)  # several chunks of the head
    measured = perplexity(open_model(folder), windows, batch_size=2)
    assert measured.perplexity == pytest.approx(slow_perplexity(folder, windows), rel=1e-5)
    assert measured.n_tokens == 5 * 19
    assert math.log(measured.perplexity) == pytest.approx(float(measured.window_nll.sum()) / measured.n_tokens)


def test_batch_size_moves_nothing_but_the_last_digits(checkpoint):
    windows = torch.randint(0, 100, (6, 16), generator=torch.Generator().manual_seed(0))
    model = open_model(checkpoint())
    values = [perplexity(model, windows, batch_size=size).perplexity for size in (1, 4, 6)]
    assert max(values) / min(values) - 1 < 1e-5


def test_loss_in_bfloat16_rounds_logits_and_losses(checkpoint):
    """Token by token from the whole installed model, every loss rounded before it is summed."""
    folder = checkpoint()
    windows = torch.randint(0, 100, (3, 12), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].bfloat16()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    assert losses.dtype == torch.bfloat16
    measured = perplexity(open_model(folder), windows, batch_size=2, dtype=torch.bfloat16)
    assert measured.perplexity == pytest.approx(math.exp(float(losses.double().mean())), rel=1e-3)
    exact = perplexity(open_model(folder), windows, batch_size=2)
    assert 1e-5 < abs(measured.perplexity / exact.perplexity - 1) < 0.02
    assert measured.window_nll.dtype == torch.float64


def test_standard_error_is_the_spread_over_windows():
    nll = torch.tensor([10.0, 14.0, 12.0, 8.0], dtype=torch.float64)
    measured = module.Perplexity(11 / 5, nll, 20)
    assert measured.standard_error == pytest.approx(measured.perplexity * float((nll / 5).std()) / 2)
    assert module.Perplexity(0.7, nll[:1], 5).standard_error is None


def test_overflow_is_an_error_not_a_number(checkpoint):
    model = open_model(checkpoint())

    def explode(index, block):
        block.get_submodule("mlp.down_proj").weight.data.fill_(float("inf"))

    with pytest.raises(NumericalError, match="evaluation window 0"):
        perplexity(model, torch.arange(20).view(2, 10), overlay=explode)


@pytest.mark.parametrize("loss", [690.0, 691.0, 5e3, 1e30])
def test_a_perplexity_that_no_number_holds_is_bounded_beside_its_mean_loss(loss):
    measured = module.Perplexity(loss, torch.tensor([0.5 * loss, 1.5 * loss], dtype=torch.float64), 2)
    figures = {"value": measured.perplexity, "stderr": measured.standard_error, "mean_loss": measured.mean_loss}
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert measured.mean_loss == loss
    assert measured.perplexity == (math.exp(690) if loss == 690 else module.LARGEST)
    assert measured.standard_error is None, "690 nats give a figure, but its error is beyond all figures"
