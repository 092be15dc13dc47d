"""What is stored of a linear: the bytes of integer grids, the one way back, row scales, bits."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from ptqbench.engine.blocks_on_disk import stored_parts
from ptqbench.numerics.gptq import gptq
from ptqbench.numerics.grid import ColumnRange, Grid, effective_bits, uniform_grid
from ptqbench.numerics.grid_spec import GridSpec
from ptqbench.numerics.rtn import round_to_nearest
from ptqbench.numerics.stored import Stored, decode

N = 64
WEIGHT = torch.tensor([[math.sin(1.7 * (r + 1) + 0.9 * c) * (1 + r / 3) for c in range(N)] for r in range(10)])
MOMENT = torch.tensor([[0.9 ** abs(i - j) * (1 + i % 5) * (1 + j % 5) for j in range(N)] for i in range(N)])
GRIDS: dict[str, Grid] = {
    "asym": uniform_grid(N, GridSpec(4)),
    "groups": uniform_grid(N, GridSpec(3, "sym_gptq", group_size=24)),
    "clip": uniform_grid(N, GridSpec(4, "sym_signed", clip_search=True)),
    "free": uniform_grid(N, GridSpec(4, range_contains_zero=False)),
    "real": uniform_grid(N, GridSpec(4, group_size=16, zero_point="real")),
    "mixed": (ColumnRange(0, 56, GridSpec(4)), ColumnRange(56, N, GridSpec(8, "sym_signed"))),
}
DIGESTS = {
    "asym": ["466e9fdc273f391e", "dce962a15b33dbe2"],
    "groups": ["649cc4c44111b84e", "011df33ae3e489fb"],
    "clip": ["9460e65dd5a48cf3", "5feecb4683c22653"],
    "free": ["466e9fdc273f391e", "dce962a15b33dbe2"],
    "real": ["e68148a49ed70ea4", "1f321b7e54e7d02f"],
    "mixed": ["5d40d174b3104fe7", "d4a0a83c8c6699cc"],
}


def digest(stored: Stored) -> str:
    """Of names, types, shapes and bytes, as the digest of a cell is made."""
    total = hashlib.sha256()
    for name, tensor in sorted(stored.tensors().items()):
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        total.update(tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


@pytest.mark.parametrize("name", GRIDS)
def test_the_bytes_of_integer_grids_are_those_of_before(name: str) -> None:
    """Golden: made by the code before there were other formats."""
    found = round_to_nearest(WEIGHT, GRIDS[name]).stored, gptq(WEIGHT, MOMENT, GRIDS[name], static_groups=True).stored
    assert [digest(stored) for stored in found] == DIGESTS[name]


@pytest.mark.parametrize("name", GRIDS)
def test_what_is_stored_is_the_weight(name: str) -> None:
    grid = GRIDS[name]
    result = gptq(WEIGHT, MOMENT, grid, static_groups=True)
    assert torch.equal(result.stored.weight(), result.dequantized)
    kept = {key.partition(".")[2]: tensor for key, tensor in stored_parts({"q": result}).items()}
    assert torch.equal(decode(kept), result.dequantized)
    assert torch.equal(torch.cat([part.weight() for part in result.stored.split_rows([3, 7])]), result.dequantized)
    assert result.stored.bits() == effective_bits(grid, len(WEIGHT))


@pytest.mark.parametrize("name", GRIDS)
def test_a_row_scale_costs_nothing_on_integer_grids(name: str) -> None:
    stored, alpha = round_to_nearest(WEIGHT.double(), GRIDS[name]).stored, torch.linspace(0.5, 1.5, 10).double()
    scaled = stored.scaled(alpha)
    assert scaled.row_scale is None
    assert scaled.bits() == stored.bits()
    torch.testing.assert_close(scaled.weight(), alpha[:, None] * stored.weight(), rtol=1e-15, atol=0)
    torch.testing.assert_close(scaled.scaled(2 / alpha).weight(), 2 * stored.weight(), rtol=1e-14, atol=0)
