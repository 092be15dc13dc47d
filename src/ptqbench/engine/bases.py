"""The calibration pass behind eigenbases: unquantized, float32, norms folded, one block in memory.

Per block: sum the second moments of what it computes over all windows (``models.capture``), turn them into bases
(``methods.eigenbases``), store them, and pass the residual stream on. A basis that all blocks share is diagonalised at the
end. Bases are float64, since their orthogonality is what makes the transform exact.

Cells share this work (``Shelf``): seeds and roundings of one method find its bases, another objective on the same model and
windows finds the moments, and with every moment found the model is not run at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptqbench.engine.blocks_on_disk import metadata_of
from ptqbench.errors import NumericalError
from ptqbench.methods.basis import FoldedBasis
from ptqbench.methods.eigenbases import COLUMNS_OF, FACTS, diagonalised, eigenbases, facts
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.capture import BlockMoments, read_moments
from ptqbench.models.stages import Positions, forward
from ptqbench.runs.files import replacing

if TYPE_CHECKING:
    from ptqbench.cell.spec import RunSpec
    from ptqbench.methods.subspace import Subspace
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
    """Where cells leave moments and bases for each other.

    Attributes:
        artefacts: The folder.
        key: Everything the moments are a function of, but for the block and the transform's ``center_embedding``: model,
            windows, kind of device. Plain data.
    """

    artefacts: Artefacts
    key: Mapping[str, Any]

    def moments_key(self, transform: Subspace, part: str) -> dict[str, Any]:
        """Return the key of the moments of a block: everything that they depend on."""
        return {**self.key, "center_embedding": transform.center_embedding, "part": part}

    def bases_key(self, transform: Subspace, spec: RunSpec, part: str) -> dict[str, Any]:
        """Return the key of the bases of a block, or of the shared basis: everything that they depend on.

        ``facts`` tells them from bases of an earlier format, which held no facts.
        """
        options = {k: v for k, v in dataclasses.asdict(transform).items() if k not in transform.without_effect_on_bases}
        low_bits = transform.low_bits(spec) if transform.objective == "joint" else None
        return {**self.key, "transform": options, "low_bits": low_bits, "part": part, "facts": True}


@torch.no_grad()
def compute_bases(
    transform: Subspace,
    model: BlockwiseModel,
    windows: Tensor,
    spec: RunSpec,
    folder: Path,
    identity: str,
    on_block: Callable[[int], None] = lambda index: None,
    shelf: Shelf | None = None,
) -> StoredBases:
    """Compute the eigenbases of a model, or find them stored.

    An interrupted pass continues after the last stored block. Where all blocks share a basis and there is no shelf, it starts
    from the beginning. The same windows give the same bases.

    Args:
        transform: Objective, granularity, options.
        model: The checkpoint; opened anew in float32 with folded norms, whatever its own basis and data type.
        windows: Calibration tokens, (n_samples, seq_len) int64, not modified.
        spec: The cell; its bits enter the joint objective.
        folder: Where the bases are stored.
        identity: What they belong to, e.g. the run id.
        on_block: Called with the index of every finished block.
        shelf: Where other cells may have left moments or bases, and find those of this one. While one process computes
            them, others that need the same moments wait for it.

    Returns:
        The stored bases.

    Raises:
        NumericalError: A moment is not finite; names the block.
    """
    computation = _Computation(transform, model, spec, StoredBases(folder, identity, model.device), shelf)
    if computation.missing():
        if shelf is None:
            computation.compute(windows, on_block)
        else:
            with shelf.artefacts.held("moments", shelf.moments_key(transform, "all")):
                computation.find()
                if computation.missing():
                    computation.compute(windows, on_block)
    return computation.stored


def missing_parts(transform: Subspace, n_blocks: int, stored: StoredBases) -> list[str]:
    """Name the parts of a transform's eigenbases that are not stored: indices of blocks, and ``shared``."""
    parts = [str(index) for index in range(n_blocks)] + [SHARED] * (transform.granularity == "full_shared")
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
    """The bases of one cell on their way from moments to the store."""

    transform: Subspace
    model: BlockwiseModel
    spec: RunSpec
    stored: StoredBases
    shelf: Shelf | None

    @property
    def one_for_all(self) -> bool:
        return self.transform.granularity == "full_shared"

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
        stream, total, missing = _Stream(self.model, self.transform, windows), None, self.missing()
        start = self._clock()
        for index in range(self.model.n_blocks):
            if str(index) in missing or self.one_for_all:
                # S = (1/T) sum_t x_t x_t^T of what the block computes, and its eigenvectors.
                moments = self._moments(index, stream)
                if str(index) in missing:
                    start = self._save(str(index), self._bases(index, moments), start)
                # The shared basis diagonalises the mean over all 2 L inputs of the stream.
                if self.one_for_all:
                    both = moments.attention + moments.mlp
                    total = both if total is None else total + both
            on_block(index)
        if total is not None:
            self._save(SHARED, diagonalised("residual", total / (2 * self.model.n_blocks)), start)

    def _moments(self, index: int, stream: _Stream) -> BlockMoments:
        if self.shelf is None:
            return stream.moments(index)
        key = self.shelf.moments_key(self.transform, str(index))
        found = self.shelf.artefacts.get("moments", key, lambda: stream.moments(index).tensors())
        return BlockMoments.of(found, self.model.device)

    def _bases(self, index: int, moments: BlockMoments) -> dict[str, Tensor]:
        model, transform = self.model, self.transform
        try:
            tensors = model.tensors(index) if transform.objective == "joint" else {}
            return eigenbases(transform, moments, tensors, model.architecture, transform.low_bits(self.spec))
        except NumericalError as error:
            raise NumericalError(f"block {index}: {error}") from error

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


@contextmanager
def _fast_products(device: torch.device) -> Iterator[None]:
    """Let a GPU compute float32 products on its TF32 units; the published codes run this pass in bfloat16, which is coarser.

    Sums of moments are float64 and are not affected.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Stream:
    """The residual stream of the norm-folded float32 model, opened and advanced only for a moment that is not stored."""

    def __init__(self, model: BlockwiseModel, transform: Subspace, windows: Tensor) -> None:
        self._given, self._center, self._windows, self._at = model, transform.center_embedding, windows, 0
        self._hidden: list[Tensor] = []

    @cached_property
    def _model(self) -> BlockwiseModel:
        folded = FoldedBasis(self._center, self._given.architecture.family)
        return self._given.reopened(folded, torch.float32)

    @cached_property
    def _positions(self) -> Positions:
        return self._model.positions(self._windows.shape[1])

    def moments(self, index: int) -> BlockMoments:
        """Return the second moments of a block. Indices must increase from call to call."""
        device = self._model.device
        if not self._hidden:
            hidden = self._model.embed(self._windows)
            self._hidden = list(hidden.to(self._model.resting_place(hidden)).split(1))
        # Advance to the block, past those whose moments were found.
        while self._at < index:
            with self._model.block(self._at) as block, _fast_products(device):
                self._hidden = [forward(block, x.to(device), self._positions).to(x.device) for x in self._hidden]
            self._at += 1
        # One pass sums the moments and gives the stream behind the block.
        with self._model.block(index) as block, _fast_products(device):
            moments, self._hidden = read_moments(block, self._hidden, self._positions, device)
        self._at += 1
        return moments
