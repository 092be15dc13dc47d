"""The work of a cell: floating-point operations and tokens, by the kinds of work that its timings name. Imports no torch.

Only the products that cannot be avoided are counted; a multiplication and an addition are two operations. A symmetric product
counts once per pair of channels. Attention counts the tokens that each token may see. Elementwise work is not counted. The record
of a cell relates its seconds to these figures, and the estimates of ``resources`` rest on them.

Legend: N tokens, T of them a window; L blocks of P weights each; d hidden size; w width of a distinct linear input (that of q, k,
v; of o; of gate and up; of down), rows(w) the outputs of the linears it feeds; V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ptqbench.cell.registry import create
from ptqbench.cell.spec import UNTOUCHED_BITS
from ptqbench.methods.base import REFERENCE, Statistic
from ptqbench.methods.transform import Calibrated

if TYPE_CHECKING:
    from ptqbench.cell.spec import BitwidthSpec, RunSpec
    from ptqbench.models.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of a cell.

    Attributes:
        flop: Operations by kind: ``bases``, ``forward``, ``reference``, ``moment``, ``round``, ``report``, ``perplexity``.
        n_tokens: Tokens by where they go: ``bases``, ``calibration``, ``evaluation``.
    """

    flop: dict[str, float]
    n_tokens: dict[str, int]


def work(spec: RunSpec, architecture: Architecture, evaluated: Mapping[str, int]) -> Work:
    """Count the work of a cell, without zero-shot tasks.

    Args:
        spec: The cell.
        architecture: Shape of its model.
        evaluated: Tokens of every text, by its label.

    Returns:
        Its operations and tokens; kinds of work that the cell does not do are left out.
    """
    # Calibration and the pass of a transform, where the cell has them.
    flop: dict[str, float] = {}
    n_tokens = {"evaluation": sum(evaluated.values())}
    if spec.calibrates and spec.calibration is not None:
        length = spec.calibration.seq_len
        if spec.quantizes:
            n_tokens["calibration"] = spec.calibration.n_samples * length
            flop |= _calibration(spec, architecture, n_tokens["calibration"], length)
        transform = create("transform", spec.method.transform)
        if isinstance(transform, Calibrated):
            tokens = n_tokens["bases"] = transform.n_samples * length
            flop["bases"] = transform.pass_flop(architecture, tokens, _forward(architecture, tokens, length))
    # Evaluation: one pass, and the output projection for every token.
    head = 2.0 * architecture.vocab_size * architecture.hidden_size
    flop["perplexity"] = sum(
        _forward(architecture, tokens, spec.evaluation.texts[label].seq_len) + head * tokens
        for label, tokens in evaluated.items()
    )
    return Work({kind: operations for kind, operations in flop.items() if operations}, n_tokens)


def _forward(architecture: Architecture, tokens: int, length: int) -> float:
    """2 P per token and block, and 2 T q_dim for the scores and sums of causal attention."""
    attention = 2.0 * architecture.n_blocks * length * architecture.q_dim
    return tokens * (2.0 * architecture.linear_params + attention)


def _calibration(spec: RunSpec, architecture: Architecture, tokens: int, length: int) -> dict[str, float]:
    members = {role: create(role, getattr(spec.method, role)) for role in ("target", "solver", "refine")}
    needed = frozenset().union(*(member.needs for member in members.values()))
    # Per distinct input of width w: its moments (symmetric ones count half), the errors of the record, the factorisation.
    one_pass = _forward(architecture, tokens, length)
    moment = round_ = report = 0.0
    for width, rows in _inputs(architecture):
        adds = rows == architecture.hidden_size
        moment += tokens * width**2  # X_q^T X_q, symmetric
        if Statistic.CROSS_MOMENT in needed:
            moment += tokens * 2.0 * width**2  # X_q^T (X - X_q)
        if Statistic.TOKEN_WEIGHTS in needed and adds:
            moment += tokens * width**2  # the weighted moment beside the plain one
        if Statistic.RESIDUAL_MOMENT in needed and adds:
            moment += tokens * 2.0 * width * architecture.hidden_size  # X_q^T (R - R_q)
        report += 2.0 * rows * width**2  # trace(E H E^T) of the error and of the weight, each over one triangle of H
        if Statistic.SECOND_MOMENT in members["solver"].needs:
            round_ += 2 / 3 * width**3 + rows * width**2  # Cholesky and inverse; updates of all later columns
    blocks = architecture.n_blocks
    rounds = spec.bitwidth.w_bits < UNTOUCHED_BITS
    passes = (1 if spec.method.true_sequential else 2) + observes(spec.bitwidth)
    return {
        "forward": one_pass * passes,
        "reference": one_pass if needed & REFERENCE else 0.0,
        "moment": blocks * moment,
        "round": blocks * round_ * rounds,
        "report": blocks * report * rounds,
    }


def observes(bits: BitwidthSpec) -> bool:
    """Whether a pass finds the largest inputs, keys and values beforehand, for formats with a number per tensor."""
    inputs = bits.a_format == "fp8" or (bits.a_format == "nvfp4" and bits.nv_input_scale == "static")
    return inputs or bits.kv_format in ("fp8", "nvfp4")


def _inputs(architecture: Architecture) -> list[tuple[int, int]]:
    """Width and rows of the distinct linear inputs of a block."""
    d, f = architecture.hidden_size, architecture.intermediate_size
    return [(d, architecture.q_dim + 2 * architecture.kv_dim), (architecture.q_dim, d), (d, 2 * f), (f, d)]
