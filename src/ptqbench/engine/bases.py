"""The pass that a transform makes over the unquantized float32 model before anything is rounded, one block in memory.

Per block: ask the transform for what it needs there (``methods.transform.Calibrated.solve_block``: eigenbases, scales), store it,
and go on to the next (``models.walk``). What all blocks share comes at the end. Everything is called a basis here.

Cells share this work (``Shelf``): seeds and roundings of one method find its bases, another objective on the same model and
windows finds the moments, and with every moment found the model is not run at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptqbench.engine.blocks_on_disk import metadata_of
from ptqbench.errors import NumericalError
from ptqbench.methods.eigenbases import COLUMNS_OF, FACTS, facts
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.walk import BlockView, Walk
from ptqbench.runs.files import replacing

if TYPE_CHECKING:
    from ptqbench.cell.spec import RunSpec
    from ptqbench.methods.transform import Calibrated
    from ptqbench.runs.artefacts import Artefacts

SHARED = "shared"


class StoredBases(Mapping[str, Tensor]):
    """Bases by name, one file per block, read when asked for.

    A file is written under a temporary name and renamed, so that its existence means it is whole.

    Attributes:
        folder: Where the files lie.
        identity: What the bases belong to; files of something else are refused.
        device: Where tensors are put when they are read.
    """

    def __init__(self, folder: Path, identity: str, device: torch.device) -> None:
        self.folder, self.identity, self.device = folder, identity, device

    def _path(self, part: str) -> Path:
        return self.folder / f"basis_{f'{int(part):04d}' if part.isdecimal() else part}.safetensors"

    def has(self, part: str) -> bool:
        """Whether a part is stored: the bases of a block (its index as text), the shared one, or another by name.

        Raises:
            ConfigError: The file belongs to something else.
            StorageError: The file cannot be read now.
        """
        return metadata_of(self._path(part), "identity", self.identity) is not None

    def save(self, part: str, bases: Mapping[str, Tensor]) -> None:
        """Write a part."""
        tensors = {name: basis.cpu().contiguous() for name, basis in bases.items()}
        with replacing(self._path(part)) as temporary:
            save_file(tensors, temporary, metadata={"identity": self.identity})

    def save_named(self, tensors: Mapping[str, Tensor]) -> None:
        """Group tensors by the part in their full names and write every part."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, key = name.rpartition(".")
            parts.setdefault(part or SHARED, {})[key] = tensor
        for part, held in parts.items():
            self.save(part, held)

    def read(self, part: str) -> dict[str, Tensor]:
        """Read all tensors of a part that `has` found, on the CPU.

        Copies: a product may depend in its last bit on where in memory its factors begin, and a mapped file has them anywhere.
        """
        with safe_open(self._path(part), framework="pt") as stored:
            return {key: stored.get_tensor(key).clone() for key in stored.keys()}  # noqa: SIM118 - not a dict

    def drop(self, part: str) -> None:
        """Remove a part, if it is there."""
        self._path(part).unlink(missing_ok=True)

    def __getitem__(self, name: str) -> Tensor:
        """Read ``residual`` (shared), ``INDEX.NAME`` or ``PART.NAME``."""
        part, _, key = name.rpartition(".")
        try:
            with safe_open(self._path(part or SHARED), framework="pt") as stored:
                basis: Tensor = stored.get_tensor(key).clone()  # as in `read`
        except (SafetensorError, FileNotFoundError) as error:
            raise KeyError(f"no basis {name!r} in {self.folder}: {error}") from None
        return basis.to(self.device)

    def __iter__(self) -> Iterator[str]:
        """Names of all stored bases."""
        for path in sorted(self.folder.glob("basis_*.safetensors")):
            part = path.stem.removeprefix("basis_")
            prefix = "" if part == SHARED else f"{int(part) if part.isdecimal() else part}."
            with safe_open(path, framework="pt") as stored:
                yield from (prefix + key for key in stored.keys())  # noqa: SIM118 - not a dict

    def __len__(self) -> int:
        """Number of stored bases."""
        return sum(1 for _ in self)


@dataclasses.dataclass(frozen=True)
class Shelf:
    """Where cells leave statistics and bases for each other.

    Attributes:
        artefacts: The folder.
        key: Everything the statistics are a function of, but for the block and the form of the model in the pass: model, windows,
            kind of device. Plain data.
    """

    artefacts: Artefacts
    key: Mapping[str, Any]

    def statistics_key(self, transform: Calibrated, part: str) -> dict[str, Any]:
        """Return the key of the statistics of a block: everything that they depend on."""
        return {**self.key, **transform.pass_form, "part": part}

    def bases_key(self, transform: Calibrated, spec: RunSpec, part: str) -> dict[str, Any]:
        """Return the key of the bases of a block, or of what all blocks share: everything that they depend on."""
        return {**self.key, **transform.depends_on(spec), "part": part}


@torch.no_grad()
def compute_bases(
    transform: Calibrated,
    model: BlockwiseModel,
    windows: Tensor,
    spec: RunSpec,
    folder: Path,
    identity: str,
    on_block: Callable[[int], None] = lambda index: None,
    shelf: Shelf | None = None,
) -> StoredBases:
    """Compute the bases of a model, or find them stored.

    An interrupted pass continues after the last stored block. Where all blocks share a basis and there is no shelf, it starts
    from the beginning. The same windows give the same bases.

    Args:
        transform: What is computed.
        model: The checkpoint; opened anew in float32 in the form that the transform asks for, whatever its own.
        windows: Calibration tokens, (n_samples, seq_len) int64, not modified.
        spec: The cell; its bits may enter the bases.
        folder: Where the bases are stored.
        identity: What they belong to, e.g. the run id.
        on_block: Called with the index of every finished block.
        shelf: Where other cells may have left statistics or bases, and find those of this one. While one process computes
            them, others that need the same wait for it.

    Returns:
        The stored bases.

    Raises:
        NumericalError: A statistic or a basis is not finite; names the block.
    """
    computation = _Computation(transform, model, spec, StoredBases(folder, identity, model.device), shelf)
    if computation.missing():
        if shelf is None:
            computation.compute(windows, on_block)
        else:
            # Those who need the same statistics wait; where none are shared, those who need the same bases.
            kind = transform.statistics or "bases"
            alone = transform.statistics is None
            key = shelf.bases_key(transform, spec, "all") if alone else shelf.statistics_key(transform, "all")
            with shelf.artefacts.held(kind, key):
                computation.find()
                if computation.missing():
                    computation.compute(windows, on_block)
    return computation.stored


def missing_parts(transform: Calibrated, n_blocks: int, stored: StoredBases) -> list[str]:
    """Name the parts of a transform's bases that are not stored: indices of blocks, and ``shared``."""
    parts = [str(index) for index in range(n_blocks)] + [SHARED] * transform.shares
    return [part for part in parts if not stored.has(part)]


def recorded_facts(stored: StoredBases) -> dict[str, Any]:
    """Read the facts that are kept about the bases of a cell.

    Args:
        stored: The bases.

    Returns:
        Plain data: index of a block, or ``shared`` -> what ``eigenbases.facts`` says; empty if no basis has facts.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name in stored:
        part, _, key = name.rpartition(".")
        if key.endswith(FACTS):
            found.setdefault(part or SHARED, {})[key] = stored[name].cpu()
    return {part: facts(bases) for part, bases in found.items()}


def left_at_identity(said: Mapping[str, Any], index: int) -> dict[str, str]:
    """Say which bases of a block are the identity because what they diagonalise is zero.

    Args:
        said: What `recorded_facts` returned.
        index: The block.

    Returns:
        Name of a linear -> remark for its row of ``layers.parquet``.
    """
    remarks: dict[str, list[str]] = {}
    for part in (SHARED, str(index)):
        for name, its in said.get(part, {}).items():
            heads = its.get("identity", [])
            which = f" of head {', '.join(map(str, heads))}" if name in ("value", "key") else ""
            for linear in COLUMNS_OF[name] if heads else ():
                remarks.setdefault(linear, []).append(
                    f"{name} basis{which} is the identity: what it diagonalises is zero"
                )
    return {linear: "; ".join(found) for linear, found in remarks.items()}


@dataclasses.dataclass(frozen=True)
class _Computation:
    """The bases of one cell on their way to the store."""

    transform: Calibrated
    model: BlockwiseModel
    spec: RunSpec
    stored: StoredBases
    shelf: Shelf | None

    def missing(self) -> list[str]:
        return missing_parts(self.transform, self.model.n_blocks, self.stored)

    def find(self) -> None:
        """Take what another cell has computed."""
        assert self.shelf is not None, "looked at only where there is one"
        for part in self.missing():
            found = self.shelf.artefacts.find("bases", self.shelf.bases_key(self.transform, self.spec, part))
            if found is not None:
                self.stored.save(part, found)

    def compute(self, windows: Tensor, on_block: Callable[[int], None]) -> None:
        """Compute and store the missing parts, block by block."""
        transform, missing, total = self.transform, self.missing(), None
        walk = Walk(self.model, transform.pass_basis(self.model.architecture), windows, self._share)
        start = self._clock()
        for index in range(self.model.n_blocks):
            if str(index) in missing or transform.shares:
                view = BlockView(walk, index)
                try:
                    if str(index) in missing:
                        start = self._save(str(index), transform.solve_block(view, self.spec), start)
                    # What all blocks share is a function of a sum over them.
                    if transform.shares:
                        term = transform.shared_term(view)
                        total = term if total is None else total + term
                except NumericalError as error:
                    raise NumericalError(f"block {index}: {error}") from error
            on_block(index)
        if total is not None:
            self._save(SHARED, transform.solve_model(total, self.model.n_blocks), start)

    def _share(self, kind: str, index: int, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        if self.shelf is None:
            return make()
        return self.shelf.artefacts.get(kind, self.shelf.statistics_key(self.transform, str(index)), make)

    def _clock(self) -> float:
        return 0.0 if self.shelf is None else self.shelf.artefacts.clock()

    def _save(self, part: str, bases: Mapping[str, Tensor], start: float) -> float:
        """Store a part with its cost since ``start``. Returns the start of the next part."""
        self.stored.save(part, bases)
        end = self._clock()
        if self.shelf is not None:
            key = self.shelf.bases_key(self.transform, self.spec, part)
            self.shelf.artefacts.put("bases", key, bases, end - start)
        return end
