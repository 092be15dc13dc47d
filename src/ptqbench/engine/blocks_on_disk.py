"""Finished blocks on disk: codes, scales, peaks of quantizers and layer records of one decoder block each.

A block's file is written under a temporary name and renamed, so that its existence means the block is finished. The weights
that the model runs with are always rebuilt from the stored codes, in the run that made them and after a resume alike.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ptqbench.errors import ConfigError, StorageError
from ptqbench.models.peaks import PEAKS
from ptqbench.numerics.grid import LinearResult
from ptqbench.numerics.stored import decode
from ptqbench.runs.files import errno_of, is_readable, replacing
from ptqbench.runs.folder import block_path


def stored_parts(results: Mapping[str, LinearResult]) -> dict[str, Tensor]:
    """Name what is stored of the rounded linears of a block: nothing of those left at 16 bits, and no dequantized weight."""
    rounded = {name: result.stored for name, result in results.items() if result.stored is not None}
    return {f"{name}.{part}": tensor for name, stored in rounded.items() for part, tensor in stored.tensors().items()}


def metadata_of(path: Path, key: str, owner: str) -> dict[str, str] | None:
    """Read the metadata of a safetensors file; None where the file is absent or damaged.

    Args:
        path: The file.
        key: Entry that names whom the file belongs to.
        owner: Whom it must belong to.

    Raises:
        ConfigError: It belongs to something else.
        StorageError: It cannot be read now.
    """
    if not is_readable(path):
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            metadata: dict[str, str] = stored.metadata() or {}
    except SafetensorError as error:
        if errno_of(error) is not None:
            raise StorageError(f"{path} cannot be read: {error}") from error
        return None
    if metadata.get(key) != owner:
        raise ConfigError(f"{path} belongs to {metadata.get(key)}, not {owner}; remove the folder to start anew")
    return metadata


@dataclasses.dataclass(frozen=True)
class BlockState:
    """The finished blocks of one cell.

    Attributes:
        folder: ``state/`` of the run folder.
        run_id: Identity of the cell; state of another cell is refused.
    """

    folder: Path
    run_id: str

    def _path(self, index: int) -> Path:
        return block_path(self.folder, index)

    def has(self, index: int) -> bool:
        """Whether a block is finished and its file is whole and of this cell."""
        return self._metadata(index) is not None

    def _metadata(self, index: int) -> dict[str, str] | None:
        return metadata_of(self._path(index), "run_id", self.run_id)

    def save(self, index: int, parts: dict[str, Tensor], layer_records: list[dict[str, Any]]) -> None:
        """Write a block: the ``stored_parts`` of its rounded linears with the peaks of its quantizers, and the layer records."""
        tensors = {name: part.cpu().clone(memory_format=torch.contiguous_format) for name, part in parts.items()}
        with replacing(self._path(index)) as temporary:
            save_file(tensors, temporary, metadata={"run_id": self.run_id, "reports": json.dumps(layer_records)})

    def overlay(self, index: int, block: nn.Module) -> None:
        """Put the quantized weights of a finished block into a loaded decoder block, and the peaks into its quantizers."""
        with safe_open(self._path(index), framework="pt") as stored:
            parts: dict[str, dict[str, Tensor]] = {}
            for key in stored.keys():  # noqa: SIM118 - not a dict
                name, _, part = key.rpartition(".")
                parts.setdefault(name, {})[part] = stored.get_tensor(key)
        for name, tensors in sorted(parts.items()):
            module = block.get_submodule(name)
            place = next(module.parameters(), next(block.parameters())).device
            for part in tensors.keys() & set(PEAKS):
                setattr(module, part, tensors.pop(part).to(place))
            if tensors:
                old: Tensor = module.weight  # type: ignore[assignment]
                module.weight = nn.Parameter(decode(tensors).to(old.device, old.dtype), requires_grad=False)

    def layer_records(self, n_blocks: int) -> list[dict[str, Any]]:
        """Read the layer records of all finished blocks, in order."""
        rows: list[dict[str, Any]] = []
        for index in range(n_blocks):
            metadata = self._metadata(index)
            rows += json.loads(metadata["reports"]) if metadata else []
        return rows

    def codes_digest(self, n_blocks: int) -> str:
        """Hash all codes, scales and zero points: equal digests mean equal quantized models."""
        total = hashlib.sha256()
        for index in range(n_blocks):
            with safe_open(self._path(index), framework="pt") as stored:
                for key in sorted(stored.keys()):
                    value = stored.get_tensor(key).contiguous()
                    total.update(f"{index}.{key}:{value.dtype}:{tuple(value.shape)}".encode())
                    total.update(value.view(torch.uint8).numpy().tobytes())
        return f"sha256:{total.hexdigest()}"
