"""The role of the transform: what it is asked, and what members leave at its default."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ptqbench.methods.base import Member
from ptqbench.methods.layout import Layout
from ptqbench.methods.precision import Precision

if TYPE_CHECKING:
    from torch import Tensor

    from ptqbench.cell.spec import RunSpec
    from ptqbench.models.architecture import Architecture
    from ptqbench.models.fuse import Basis
    from ptqbench.models.walk import BlockView

KV_BITS = "kv.bits"
"""Name of the bits of keys and values by block among what is prepared for a transform."""


@dataclasses.dataclass(frozen=True)
class Learning:
    """How rotations are learned: Cayley steps on the mean loss per token of the network with quantizers on.

    Attributes:
        steps: Number of steps; the rate falls from ``learning_rate`` along half a cosine.
        learning_rate: Longest step.
        momentum: Share of the velocity that is kept from step to step.
        batch_size: Calibration windows per step; each is used once.
        quantize_weights: Whether weights are rounded to nearest in the loss, too.
    """

    steps: int
    learning_rate: float
    momentum: float
    batch_size: int
    quantize_weights: bool

    @property
    def n_samples(self) -> int:
        """Calibration windows that are needed."""
        return self.steps * self.batch_size


@dataclasses.dataclass(frozen=True)
class FileMatrix:
    """A matrix in a file.

    Attributes:
        name: Its name there.
        shape: The shape that it must have.
        table: Whether sqrt(K) times an orthogonal matrix of order K is taken too (+-1 tables of Hadamard matrices).
    """

    name: str
    shape: tuple[int, ...]
    table: bool = False


def fixed_stream(architecture: Architecture, what: str, remedy: str) -> str | None:
    """Say why the basis of a family's residual stream cannot change, or None if it can.

    Args:
        architecture: Gives the family.
        what: The options that change it.
        remedy: What to do instead.
    """
    norm = architecture.family.writes_through_norm
    if norm is None:
        return None
    return (
        f"{what} changes the basis of the residual stream, but {architecture.model_type} has a norm ({norm}) between o_proj or "
        f"down_proj and the stream, and its gain does not commute with a rotation: the rotation would have to run online behind "
        f"that norm, which no transform here does; {remedy}"
    )


class Transform(Member, ABC):
    """In which basis do we quantize? Its grids follow from its layout and the cell."""

    @property
    def learning(self) -> Learning | None:
        """How its rotations are learned on the loss of the quantized network; None if they are not."""
        return None

    def start(self, architecture: Architecture) -> dict[str, Tensor]:
        """Draw the rotations that learning starts from, by name; float64, orthogonal."""
        raise NotImplementedError

    def from_files(self, architecture: Architecture, held: Collection[str]) -> dict[str, FileMatrix]:
        """Map our names to the matrices to take from its files, which hold the names ``held``."""
        return {}

    def deviations(self, architecture: Architecture) -> list[str]:
        """Say in words what a model rules out of the method, and what is done instead; recorded with the result."""
        return []

    def layout(self) -> Layout:
        """Say how the transform splits axes; here not at all."""
        return Layout()

    def precision(
        self, spec: RunSpec, architecture: Architecture, bases: Mapping[str, Tensor] | None = None
    ) -> Precision:
        """Return the grids of weights, inputs, keys and values in this basis.

        Args:
            spec: The cell.
            architecture: Dimensions.
            bases: Holds ``KV_BITS``, bits of keys and values by block (L, 2), where they were distributed.
        """
        found = None if bases is None else bases.get(KV_BITS)
        blocks = None if found is None else tuple((int(keys), int(values)) for keys, values in found.tolist())
        return Precision(spec, architecture, self.layout(), blocks)

    @abstractmethod
    def basis(
        self, spec: RunSpec, architecture: Architecture, bases: Mapping[str, Tensor] | None = None
    ) -> Basis | None:
        """Return how tensors are fused and blocks are planned; None for the checkpoint as it is.

        Args:
            spec: The cell.
            architecture: Dimensions.
            bases: What was computed, learned or read beforehand, by name; None where nothing was.
        """


class Calibrated(Transform):
    """A transform that looks at the unquantized float32 model first, block by block (``ptqbench.engine.bases``).

    What it computes for a block is stored under ``INDEX.NAME`` and given to ``basis``.
    """

    n_samples: int
    """Calibration windows of the pass."""
    pass_streams: ClassVar[int] = 2
    """Tensors of the size of all windows that the pass holds at most: the stream before and behind a block."""
    statistics: ClassVar[Literal["moments", "magnitudes"] | None] = None
    """Which statistics of a block it reads, which cells share; None for those that nobody else needs."""

    def pass_basis(self, architecture: Architecture) -> Basis | None:
        """The form in which the model is looked at; None for the checkpoint as it is."""
        return None

    @property
    def pass_form(self) -> dict[str, Any]:
        """Names that form in the keys of shared statistics, as plain data."""
        return {"form": "checkpoint"}

    def depends_on(self, spec: RunSpec) -> dict[str, Any]:
        """Everything that its results depend on beside model, windows, device and block, as plain data."""
        return {"transform": {"name": type(self).__name__, **dataclasses.asdict(self)}}  # type: ignore[call-overload]

    @abstractmethod
    def solve_block(self, view: BlockView, spec: RunSpec) -> dict[str, Tensor]:
        """Compute the tensors of one block by name.

        Args:
            view: What can be asked about the block; nothing is computed that is not asked for.
            spec: The cell.

        Raises:
            NumericalError: Something is not finite.
        """

    @property
    def shares(self) -> bool:
        """Whether all blocks share something: what `solve_model` makes of the sum of every block's `shared_term`."""
        return False

    def shared_term(self, view: BlockView) -> Tensor:
        """What a block adds to the sum."""
        raise NotImplementedError

    def solve_model(self, total: Tensor, n_blocks: int) -> dict[str, Tensor]:
        """Compute the tensors that all blocks share from the sum."""
        raise NotImplementedError

    def pass_flop(self, architecture: Architecture, tokens: int, forward: float) -> float:
        """Count the operations of the pass over some tokens, of which ``forward`` run them through the blocks once."""
        return forward
