"""Refinements: repairs after rounding. All of them keep codes and zero points and rescale rows."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from ptqbench.cell.spec import added
from ptqbench.methods.base import Aim, LinearName, Refine, Repaired, Statistic, Statistics

if TYPE_CHECKING:
    from torch import Tensor

    from ptqbench.cell.spec import RunSpec
    from ptqbench.models.architecture import Architecture
    from ptqbench.numerics.grid import LinearResult


@dataclasses.dataclass(frozen=True)
class NoRefinement(Refine):
    """Leave the rounded linear as the solver made it."""

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        return None

    def repair(self, weight: Tensor, aim: Aim, result: LinearResult, statistics: Statistics) -> Repaired:
        return Repaired(result)


@dataclasses.dataclass(frozen=True)
class NullSpace(Refine):
    """Rescale rows so that the rounding error moves towards the null space of the inputs (Q2N, arXiv 2506.11044).

    Attributes:
        threshold: Ratio of weak to strong eigenvalues at which the signal space ends.
        ridge: Pull of the row scales towards 1, absolute, in squared weight units.
        moment: Whose eigenvectors: of ``full``, the second moment of all tokens, or of ``posavg``, that of the mean over
            windows position by position, as in the authors' code.
        reference: What rows are moved towards: the ``original`` weight, or the ``working`` copy of the solver, as in the
            authors' code. Every column of that copy holds the updates by the column blocks before its own. A solver without
            such a copy (rtn) is given the target instead.
        solver: How the row scales are found (the option is part of the identity of cells, hence the name): ``closed``, or
            ``adam20``: 20 steps of Adam, as in the authors' code for GPTQ, within about .04 of 1.
        exclude: Linears left as they are.
        projector_order: Order of the channels of the signal space: that of the weights (``permuted``), or, as in the
            authors' code, the original one beside weights in the order of processing (``as_code``; differs under act_order).
    """

    threshold: Annotated[float, Field(ge=0)] = 0.1
    ridge: Annotated[float, Field(ge=0)] = 0.2
    moment: Literal["full", "posavg"] = "full"
    reference: Literal["original", "working"] = "original"
    solver: Literal["closed", "adam20"] = "closed"
    exclude: tuple[LinearName, ...] = ("mlp.down_proj",)
    projector_order: Literal["permuted", "as_code"] = added("permuted")

    @property
    def reads_working(self) -> bool:
        return self.reference == "working"

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({Statistic.SECOND_MOMENT if self.moment == "full" else Statistic.POSITION_MEAN})

    def repair(self, weight: Tensor, aim: Aim, result: LinearResult, statistics: Statistics) -> Repaired:
        """Return the rescaled result; unchanged, with rank None, if the rank rule finds no signal space."""
        from ptqbench.numerics.null_space import null_space_row_scale, signal_space

        moment = statistics.second_moment if self.moment == "full" else statistics.position_moment
        assert moment is not None, "the pipeline collects what a member needs"
        # U1: the leading eigenvectors of the moment, as many as the rank rule says.
        basis = signal_space(moment, threshold=self.threshold)
        if basis is None:
            return Repaired(result)
        reference = weight if self.reference == "original" else aim.weight if result.working is None else result.working
        # The authors' code projects weights in the order of processing with a projector in the original order.
        rounded = result.dequantized
        if self.projector_order == "as_code" and result.order is not None:
            reference, rounded = reference[:, result.order], rounded[:, result.order]
        # alpha_i = 1 + <(w_i - q_i) U1, q_i U1> / (||q_i||^2 + ridge). A scale per row applies to columns in any order.
        alpha = null_space_row_scale(reference, rounded, basis, ridge=self.ridge, solver=self.solver)
        return Repaired(_rescaled(result, alpha), alpha, basis.shape[1])


@dataclasses.dataclass(frozen=True)
class ScaleRefit(Refine):
    """Rescale rows to the least output error on the calibration tokens: the control for every null-space comparison.

    The error is that which the solver was asked to minimise: towards the target, under its (token-weighted) second moment.
    """

    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.SECOND_MOMENT})

    def repair(self, weight: Tensor, aim: Aim, result: LinearResult, statistics: Statistics) -> Repaired:
        from ptqbench.numerics.scale_refit import refit_row_scale

        # alpha_i = argmin (v_i - alpha_i q_i) H (v_i - alpha_i q_i)^T
        alpha = refit_row_scale(aim.weight, result.dequantized, aim.second_moment)
        return Repaired(_rescaled(result, alpha), alpha)


def _rescaled(result: LinearResult, row_scale: Tensor) -> LinearResult:
    from ptqbench.numerics.null_space import apply_row_scale

    assert result.stored is not None, "a refinement acts on rounded weights"
    dequantized = apply_row_scale(row_scale, result.dequantized)
    return dataclasses.replace(result, stored=result.stored.scaled(row_scale), dequantized=dequantized)
