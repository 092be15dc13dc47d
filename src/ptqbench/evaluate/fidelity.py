"""How far a quantized model is from its own unquantized model on the same tokens.

    KL_t = sum_v p_t(v) (log p_t(v) - log q_t(v))         p of the reference, q of the model, position t predicts token t + 1

The reference keeps of each position its ``TOP`` largest log-probabilities and the log of what the other tokens have together;
the whole vocabulary of 128 x 2048 positions would be 80 GB. The other tokens then count as one. By the log-sum inequality this
makes the divergence smaller, by P_rest KL(p_rest || q_rest), and never negative. Where the vocabulary has at most ``TOP`` tokens
the divergence is exact. Log-probabilities are stored in float16 and normalised again when they are read: the rounded reference is
a distribution too, so a divergence is never negative, and rounding moves that of a position by less than a hundredth of itself.

Source: the quantities are those of llama.cpp's ``--kl-divergence``, which stores 16-bit logits of the whole vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import torch
from torch import Tensor

TOP = 256
"""Tokens of a position that the reference keeps one by one."""
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
CONFIDENCE = (0.5, 0.9)
"""Bounds of the reference's largest probability by which divergences are split."""


class Reference:
    """Observer of a perplexity pass that keeps what a later model is compared with."""

    def __init__(self, top: int = TOP) -> None:
        """Keep so many tokens of a position one by one."""
        self._top = top
        self._parts: list[dict[str, Tensor]] = []

    def __call__(self, logits: Tensor, wanted: Tensor) -> None:
        """Keep a chunk: logits (positions, vocabulary), the tokens that follow (positions,)."""
        log_p = logits.log_softmax(-1)
        kept, ids = log_p.topk(min(self._top, log_p.shape[-1]))
        part = {
            "ids": ids.int(),
            "log_p": kept.half(),
            "log_rest": _rest(log_p, ids).half(),
            "log_true": log_p.gather(1, wanted[:, None])[:, 0].float(),
        }
        self._parts.append({name: tensor.cpu() for name, tensor in part.items()})

    def tensors(self) -> dict[str, Tensor]:
        """What was kept of N positions.

        Returns:
            ``ids`` (N, top) int32 by falling probability, their ``log_p`` float16, ``log_rest`` (N,) float16 of all other tokens
            together, ``log_true`` (N,) float32 of the token that follows; nats.
        """
        return {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}


class Divergence:
    """Observer of a perplexity pass that compares every position with the reference.

    Attributes:
        kl: KL divergence per position, (N,) float64, nats.
        same_top: Whether both rank the same token first, (N,) bool; a tie for the first place counts as the same.
        moved: |log q - log p| of the token that follows, (N,) float64, nats.
        confidence: Largest probability of the reference, (N,) float64.
    """

    def __init__(self, reference: dict[str, Tensor]) -> None:
        """Compare with what ``Reference.tensors`` returned."""
        self._reference, self._at = reference, 0
        n = len(reference["log_true"])
        self.kl, self.moved, self.confidence = (torch.empty(n, dtype=torch.float64) for _ in range(3))
        self.same_top = torch.empty(n, dtype=torch.bool)

    def __call__(self, logits: Tensor, wanted: Tensor) -> None:
        """Compare a chunk: logits (positions, vocabulary), the tokens that follow (positions,)."""
        here = slice(self._at, self._at + len(logits))
        self._at = here.stop
        then = {name: tensor[here].to(logits.device) for name, tensor in self._reference.items()}
        ids = then["ids"].long()
        log_q = logits.log_softmax(-1)
        # p and q over the kept tokens and one bucket of all others; both sum to one again after their rounding.
        p = torch.cat([then["log_p"], then["log_rest"][:, None]], 1).double().log_softmax(-1)
        q = torch.cat([log_q.gather(1, ids), _rest(log_q, ids)[:, None]], 1).double().log_softmax(-1)
        # KL = sum p (log p - log q); a bucket without probability adds nothing.
        self.kl[here] = torch.where(p > -math.inf, p.exp() * (p - q), 0.0).sum(-1).cpu()
        self.same_top[here] = (logits.gather(1, ids[:, :1])[:, 0] == logits.amax(-1)).cpu()
        self.moved[here] = (log_q.gather(1, wanted[:, None])[:, 0] - then["log_true"]).abs().double().cpu()
        self.confidence[here] = p[:, 0].exp().cpu()


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """The figures of a text.

    Attributes:
        windows: Mean of ``kl``, ``top1`` (share of equal first tokens) and ``moved`` per window, (n_windows,) float64 each.
        summary: ``kl``, ``top1`` and ``moved`` with value and standard error over windows, and how ``kl`` is distributed.
    """

    windows: dict[str, Tensor]
    summary: dict[str, Any]

    def metrics(self, noise: float) -> dict[str, Any]:
        """The metrics of the text: ``kl``, with all that is known about it, and ``top1``.

        Args:
            noise: Mean KL divergence of the reference from itself.
        """
        about = {"noise": noise, "top": TOP, "moved": self.summary["moved"]}
        return {"kl": self.summary["kl"] | about, "top1": self.summary["top1"]}


def summarise(found: Divergence, n_windows: int) -> Fidelity:
    """Put the figures of all positions of a text together.

    Args:
        found: The positions of ``n_windows`` windows of equal length.
        n_windows: Number of windows.
    """
    positions = {"kl": found.kl, "top1": found.same_top.double(), "moved": found.moved}
    windows = {name: values.view(n_windows, -1).mean(1) for name, values in positions.items()}
    summary: dict[str, Any] = {name: _mean(values) for name, values in windows.items()}
    ordered = found.kl.sort().values
    last = len(ordered) - 1
    spread = {name: float(ordered[math.ceil(share * last)]) for name, share in QUANTILES.items()}
    bounds = (0.0, *CONFIDENCE, 1.0 + 1e-9)
    parts = {}
    for low, high in itertools.pairwise(bounds):
        inside = (found.confidence >= low) & (found.confidence < high)
        share = float(inside.double().mean())
        parts[f"{low:g}"] = {"share": share, "kl": float(found.kl[inside].mean()) if share else None}
    summary["kl"] |= {**spread, "max": float(ordered[-1]), "by_confidence_from": parts}
    return Fidelity(windows, summary)


def _mean(values: Tensor) -> dict[str, Any]:
    n = len(values)
    return {"value": float(values.mean()), "stderr": float(values.std()) / math.sqrt(n) if n > 1 else None}


def _rest(log_p: Tensor, ids: Tensor) -> Tensor:
    """Log of the probability of all tokens but ``ids`` (positions, top) together, (positions,); -inf where there are none."""
    return log_p.scatter(1, ids, -math.inf).logsumexp(-1)
