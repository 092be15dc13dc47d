"""Fused linears of an installed class, taken apart: each part is a linear of its own under the name that Llama gives it.

Phi-3 computes q, k and v (gate and up) with one matrix. A method rounds them one by one, so the parts are registered beside the
fused linear, and that is replaced by a module that joins their outputs. The modeling code stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ptqbench.models.architecture import Architecture


class Joined(nn.Module):
    """The place of a fused linear: runs the parts, which are modules of ``owner``, and joins their outputs."""

    def __init__(self, owner: nn.Module, parts: tuple[str, ...]) -> None:
        """Refer to the parts by name, so that those which replace them later are found.

        Args:
            owner: The attention or the MLP; it is referred to, not held as a submodule.
            parts: Names of the parts in it, in the order of the rows.
        """
        super().__init__()
        self.__dict__["owner"] = owner
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., sum of the parts' outputs)."""
        owner: Any = self.__dict__["owner"]
        return torch.cat([owner.get_submodule(part)(x) for part in self.parts], dim=-1)


def take_apart(block: nn.Module, architecture: Architecture) -> None:
    """Replace the fused linears of a block without weights (device meta) by their parts; the others stay."""
    shapes = architecture.linear_shapes()
    for whole, parts in architecture.family.fused.items():
        owner = block.get_submodule(whole.rpartition(".")[0])
        dtype = block.get_parameter(f"{whole}.weight").dtype
        for part in parts:
            rows, columns = shapes[part]
            block.set_submodule(part, nn.Linear(columns, rows, bias=False, device="meta", dtype=dtype))
        block.set_submodule(whole, Joined(owner, tuple(part.rpartition(".")[2] for part in parts)))


def split(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Cut the fused weights of a stored block into their parts (views); the other tensors stay as they are."""
    found, shapes = dict(tensors), architecture.linear_shapes()
    for whole, parts in architecture.family.fused.items():
        rows = found.pop(f"{whole}.weight").split([shapes[part][0] for part in parts])
        found |= {f"{part}.weight": weight for part, weight in zip(parts, rows, strict=True)}
    return found
