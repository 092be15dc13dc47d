"""The matrices of a transform, needed before a model is opened in its basis: eigenbases, learned rotations, or those of a file.

All are kept in the same store (``bases.StoredBases``) and are found there when a cell is run again. Learned rotations minimise
the loss of the whole quantized network (``network_loss``) by Cayley steps in float64 (``numerics.cayley``).
"""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ptqbench.engine.bases import SHARED, Shelf, StoredBases, compute_bases, missing_parts
from ptqbench.engine.kv_bits import KV_PART, distribute
from ptqbench.engine.network_loss import Rotations, opened
from ptqbench.engine.rotation_files import read_rotations
from ptqbench.errors import ConfigError, NumericalError
from ptqbench.methods.transform import Calibrated, Transform
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.numerics.cayley import cayley_step, cosine_rate

if TYPE_CHECKING:
    from ptqbench.cell.spec import RunSpec
    from ptqbench.models.fuse import Basis
    from ptqbench.numerics.grid import Grid
    from ptqbench.runs.attempt import Observer

PROGRESS = "progress"
SAVE_EVERY = 10
"""Steps of learning that a killed run repeats at most."""


class Calibration(Protocol):
    """Calibration windows by their number, and where cells leave each other what they computed from them."""

    def windows(self, n_samples: int | None = None) -> Tensor:
        """Draw (n_samples, seq_len) int64; by default as many as the cell has."""

    def shelf(self, n_samples: int) -> Shelf | None:
        """Where moments and bases over ``n_samples`` windows are shared; None if they are not."""


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Computes, learns or reads the matrices of a transform before a model is opened in its basis, or finds them stored.

    Attributes:
        model: The checkpoint.
        spec: The cell.
        folder: Where results are stored.
        identity: What they belong to, e.g. the run id.
        observer: Shown the progress.
        calibration: Where windows come from.
    """

    model: BlockwiseModel
    spec: RunSpec
    folder: Path
    identity: str
    observer: Observer
    calibration: Calibration

    def of(self, transform: Transform) -> StoredBases | None:
        """Prepare a transform.

        Returns:
            Tensors by name, for ``transform.basis``; None if it needs none.

        Raises:
            ConfigError: A file of rotations is missing, damaged, changed, or does not fit the model.
            NumericalError: A moment or a gradient is not finite.
        """
        stored = StoredBases(self.folder, self.identity, self.model.device)
        learning = transform.learning
        if transform.files:
            read_rotations(transform, self.model.architecture, stored)
        measured = self.spec.bitwidth.kv_measure is not None
        if measured and not stored.has(KV_PART):
            distribute(self.model, self.spec, stored, self.calibration.windows, self.observer)
        if isinstance(transform, Calibrated) and missing_parts(transform, self.model.n_blocks, stored):
            self._compute(transform)
        if learning is not None:
            self.observer.stage("rotations", learning.steps)
            windows = self.calibration.windows(learning.n_samples)
            learn_rotations(transform, self.model, windows, self.spec, stored, self._advance)
        asked = measured or transform.files or isinstance(transform, Calibrated) or learning is not None
        return stored if asked else None

    def _compute(self, transform: Calibrated) -> None:
        self.observer.stage("bases", self.model.n_blocks)
        windows, shelf = self.calibration.windows(transform.n_samples), self.calibration.shelf(transform.n_samples)
        compute_bases(transform, self.model, windows, self.spec, self.folder, self.identity, self._advance, shelf)

    def _advance(self, _: int) -> None:
        self.observer.advance()


def learn_rotations(
    transform: Transform,
    model: BlockwiseModel,
    windows: Tensor,
    spec: RunSpec,
    stored: StoredBases,
    on_step: Callable[[int], None] = lambda step: None,
) -> StoredBases:
    """Learn the rotations of a transform, or find them stored.

    An interrupted pass continues at the last stored step (every `SAVE_EVERY` steps) and gives the same bytes.

    Args:
        transform: ``learning`` holds the settings, ``start`` the first rotations, ``basis`` their effect on the model.
        model: The checkpoint, in the basis it has.
        windows: Calibration tokens, (steps * batch_size, seq_len) int64, not modified; each is used once, in order.
        spec: The cell; its quantizers are on in the loss.
        stored: Where the rotations go. Eigenbases that the transform needs are there already and are not changed.
        on_step: Called with the index of every finished step.

    Returns:
        ``stored``.

    Raises:
        ConfigError: Too few windows.
        NumericalError: The loss or a gradient is not finite; names the step.
    """
    learning = transform.learning
    assert learning is not None, "asked of transforms that learn"
    if len(windows) < learning.n_samples:
        raise ConfigError(f"learning rotations: expected {learning.n_samples} windows, got {len(windows)}")
    # R_0: the rotations to start from, each orthogonal.
    rotations = {name: value.to(model.device) for name, value in transform.start(model.architecture).items()}
    parts = {part or SHARED for part, _, _ in (name.rpartition(".") for name in rotations)}
    if not all(stored.has(part) for part in parts):
        first, rotations, velocities = _progress(stored, rotations)

        def build(given: Rotations) -> Basis:
            basis = transform.basis(spec, model.architecture, ChainMap(given, stored))  # type: ignore[arg-type]
            assert basis is not None, "what is learned is a basis"
            return basis

        with opened(model, windows.shape[1], weight_grids(transform, model, spec)) as network:
            for step in range(first, learning.steps):
                # Step t uses its own windows and the learning rate of a cosine schedule.
                batch = windows[step * learning.batch_size : (step + 1) * learning.batch_size]
                rate = cosine_rate(step, learning.steps, learning.learning_rate)
                # G = dL / dR, then R <- Cayley(a W) R with W from G and R: R stays orthogonal.
                try:
                    _, gradients = network.gradients(build, rotations, batch)
                    for name, gradient in gradients.items():
                        point, velocity, _ = cayley_step(
                            rotations[name],
                            gradient,
                            velocities.get(name),
                            learning_rate=rate,
                            momentum=learning.momentum,
                        )
                        # Contiguous, as they are read back: the last bit of a product may depend on the layout.
                        rotations[name], velocities[name] = point.contiguous(), velocity.contiguous()
                except NumericalError as error:
                    raise NumericalError(f"learning rotations, step {step}: {error}") from error
                if (step + 1) % SAVE_EVERY == 0 and step + 1 < learning.steps:
                    _save_progress(stored, step + 1, rotations, velocities)
                on_step(step)
        stored.save_named(rotations)
    stored.drop(PROGRESS)  # also where an earlier process was killed before this line
    return stored


def weight_grids(transform: Transform, model: BlockwiseModel, spec: RunSpec) -> dict[str, Grid]:
    """The grids that the loss rounds weights to; none where it leaves them alone."""
    if transform.learning is None or not transform.learning.quantize_weights:
        return {}
    precision = transform.precision(spec, model.architecture)
    return {name: precision.weight_grid(name) for name in model.architecture.linear_shapes()}


def _progress(stored: StoredBases, start: Rotations) -> tuple[int, Rotations, Rotations]:
    if not stored.has(PROGRESS):
        return 0, start, {}
    held = stored.read(PROGRESS)
    point = {name: held[f"point.{name}"].to(start[name].device) for name in start}
    velocity = {name: held[f"velocity.{name}"].to(start[name].device) for name in start}
    return int(held["step"]), point, velocity


def _save_progress(stored: StoredBases, step: int, rotations: Rotations, velocities: Rotations) -> None:
    held = {f"point.{name}": value for name, value in rotations.items()}
    held |= {f"velocity.{name}": value for name, value in velocities.items()}
    stored.save(PROGRESS, held | {"step": torch.tensor(step)})
