"""Divergence from the unquantized model, against the whole vocabulary in float64 by scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr

from ptqbench.evaluate.fidelity import Divergence, Reference, summarise
from ptqbench.evaluate.perplexity import perplexity
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.source import ModelSource

VOCABULARY, WINDOWS, LENGTH = 300, 3, 9


def distributions(seed=0, n=WINDOWS * (LENGTH - 1), noise=0.3):
    """Logits of a reference and of a model near it, and the tokens that follow; float64."""
    draw = torch.Generator().manual_seed(seed)
    reference = 3 * torch.randn(n, VOCABULARY, generator=draw, dtype=torch.float64)
    model = reference + noise * torch.randn(n, VOCABULARY, generator=draw, dtype=torch.float64)
    return reference, model, torch.randint(VOCABULARY, (n,), generator=draw)


def compared(reference, model, wanted, top, chunk=5):
    """Show both in chunks of different sizes, as passes with other batches do."""
    kept = Reference(top)
    for logits, tokens in zip(reference.split(chunk), wanted.split(chunk), strict=True):
        kept(logits, tokens)
    found = Divergence(kept.tensors())
    for logits, tokens in zip(model.split(chunk + 2), wanted.split(chunk + 2), strict=True):
        found(logits, tokens)
    return found


def exact(reference, model):
    """KL over the whole vocabulary, (N,)."""
    return rel_entr(*(np.exp(log_softmax(x.numpy(), axis=-1)) for x in (reference, model))).sum(-1)


def test_equals_scipy_where_the_whole_vocabulary_is_kept():
    reference, model, wanted = distributions()
    found = compared(reference, model, wanted, top=VOCABULARY)
    assert found.kl.numpy() == pytest.approx(exact(reference, model), rel=1e-2)
    assert found.kl.mean() == pytest.approx(exact(reference, model).mean(), rel=1e-3)
    log_p, log_q = (log_softmax(x.numpy(), axis=-1) for x in (reference, model))
    rows = np.arange(len(wanted))
    assert found.moved.numpy() == pytest.approx(abs(log_q - log_p)[rows, wanted.numpy()], abs=1e-6)
    assert found.same_top.tolist() == (log_p.argmax(-1) == log_q.argmax(-1)).tolist()
    assert found.confidence.numpy() == pytest.approx(np.exp(log_p.max(-1)), rel=1e-3)


@pytest.mark.parametrize("top", [1, 16, 64])
def test_one_bucket_for_the_rest_makes_it_smaller_by_what_the_docstring_says(top):
    reference, model, wanted = distributions()
    whole, kept = exact(reference, model), compared(reference, model, wanted, top).kl.numpy()
    p, q = (np.exp(log_softmax(x.numpy(), axis=-1)) for x in (reference, model))
    order = np.argsort(-p, axis=-1)[:, top:]
    p, q = np.take_along_axis(p, order, -1), np.take_along_axis(q, order, -1)
    mass = p.sum(-1)
    lost = mass * rel_entr(p / mass[:, None], q / q.sum(-1, keepdims=True)).sum(-1)
    assert kept == pytest.approx(whole - lost, rel=1e-2, abs=1e-5)
    assert (kept >= 0).all()


def test_a_model_is_at_no_distance_from_itself():
    reference, _, wanted = distributions()
    found = compared(reference, reference, wanted, top=32)
    assert float(found.kl.max()) < 1e-6
    assert bool(found.same_top.all())
    assert float(found.moved.max()) < 1e-6


def test_figures_of_a_text():
    reference, model, wanted = distributions()
    found = compared(reference, model, wanted, top=VOCABULARY)
    text = summarise(found, WINDOWS)
    values = found.kl.numpy()
    per_window = values.reshape(WINDOWS, -1).mean(1)
    assert text.windows["kl"].numpy() == pytest.approx(per_window)
    said = text.summary["kl"]
    assert said["value"] == pytest.approx(values.mean())
    assert said["stderr"] == pytest.approx(per_window.std(ddof=1) / math.sqrt(WINDOWS))
    assert said["max"] == values.max()
    for name, share in {"median": 0.5, "p90": 0.9, "p99": 0.99}.items():
        assert said[name] == np.quantile(values, share, method="higher")
    parts = said["by_confidence_from"]
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
    assert sum(part["share"] * (part["kl"] or 0) for part in parts.values()) == pytest.approx(values.mean())
    assert text.summary["top1"]["value"] == pytest.approx(found.same_top.double().mean())


def test_a_pass_of_a_model_against_its_reference(checkpoint):
    """The reference is made window by window, the comparison in batches: the order of sums is all that differs."""
    model = BlockwiseModel(ModelSource(checkpoint()), torch.float32, torch.device("cpu"))
    windows = torch.randint(0, 100, (4, 12), generator=torch.Generator().manual_seed(0))
    kept = Reference()
    alone = perplexity(model, windows, batch_size=1, observe=kept)
    assert kept.tensors()["log_true"].view(4, -1).double().sum(1) == pytest.approx(-alone.window_nll, rel=1e-5)
    found = Divergence(kept.tensors())
    perplexity(model, windows, batch_size=3, observe=found)
    assert float(found.kl.abs().max()) < 1e-6

    def louder(index, block):
        block.mlp.down_proj.weight.data *= 3

    found = Divergence(kept.tensors())
    perplexity(model, windows, louder, batch_size=3, observe=found)
    assert float(found.kl.min()) > 0
