"""Which columns, tokens and heads are quantized to how many bits: weight grids, quantizers of a live block, storage.

A transform says how it splits an axis (`Layout`); the cell says the bits and the kind of grid. `Precision` puts the two
together. Columns run from low to high importance: [lowest | bulk | high]. What is split: the input of q, k, v, gate and up
along the hidden size; the input of o, keys and values along every head; the input of down_proj is uniform.

Sources: arXiv 2404.00456 (QuaRot), 2412.14363 (ResQ), and the codes spcl/QuaRot@5008669, utkarsh-dmx/project-resq@cb87d0d,
Zachary5895/CoQuant@0e2e343. General inputs and keys have a range that contains 0; grouped inputs (values, and the input of
o where it is quantized per head) have the plain minimum and maximum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from statistics import mean
from typing import TYPE_CHECKING

from ptqbench.cell.spec import KV_CHOICES, UNTOUCHED_BITS
from ptqbench.errors import ConfigError, UnsupportedError
from ptqbench.methods.formats import format_reason, no_format
from ptqbench.methods.layout import Layout, StorageBits
from ptqbench.models.architecture import ATTENTION_INPUT, ATTENTION_OUTPUT, MLP_INPUT, MLP_OUTPUT
from ptqbench.numerics.bits import kv_overhead_bits, mean_bits
from ptqbench.numerics.formats import FORMATS, INTEGER, of_width

if TYPE_CHECKING:
    from torch import Tensor

    from ptqbench.cell.spec import RunSpec
    from ptqbench.models.architecture import Architecture
    from ptqbench.models.quantized import BasisChange, BlockPlan, KvPlan
    from ptqbench.numerics.activation import ActivationGrid
    from ptqbench.numerics.grid import Grid
    from ptqbench.numerics.grid_spec import GridSpec

STAGE_LINEARS = {"qkv": ATTENTION_INPUT, "o": ATTENTION_OUTPUT, "gate_up": MLP_INPUT, "down": MLP_OUTPUT}
INT8 = 8
GRID_NUMBER_BITS = 16
"""Bits of one scale or zero point that is stored with cached keys and values, and of one scale of a stored basis change."""


@dataclasses.dataclass(frozen=True)
class Precision:
    """The grids of one cell.

    Attributes:
        spec: The cell: bits, kinds of grid.
        architecture: Dimensions.
        layout: The split of the transform.
        kv_bits: Bits of keys and of values of every block, where they were distributed; None for those of the cell.
    """

    spec: RunSpec
    architecture: Architecture
    layout: Layout
    kv_bits: tuple[tuple[int, int], ...] | None = None

    def at(self, index: int) -> Precision:
        """The precision of one block, with the bits of its own keys and values.

        Raises:
            ConfigError: Those bits were to be distributed and are not here.
        """
        if self.kv_bits is None:
            if self.spec.bitwidth.kv_measure is not None:
                raise ConfigError(
                    "bitwidth.kv_measure needs the bits of every block: distribute them first (engine.kv_bits)"
                )
            return self
        keys, values = self.kv_bits[index]
        bits = dataclasses.replace(
            self.spec.bitwidth, k_bits=keys, v_bits=values, kv_measure=None, kv_choices=KV_CHOICES
        )
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, bitwidth=bits), kv_bits=None)

    def unused(self) -> list[str]:
        """Say that keys and values take fewer bits than they may, because no further step fits; else nothing."""
        bits = self.spec.bitwidth
        used = sum(map(sum, self.kv_bits or ()))
        asked = (bits.k_bits + bits.v_bits) * len(self.kv_bits or ())
        if used == asked:
            return []
        found, wanted = (total / (2 * len(self.kv_bits or ())) for total in (used, asked))
        return [f"keys and values take {found:.3g} of {wanted:g} bits: no further step of kv_choices fits"]

    def weight_grid(self, name: str) -> Grid:
        """Build the grid of a linear.

        Args:
            name: A linear (``self_attn.o_proj``) or a stage (``qkv``, ``o``, ``gate_up``, ``down``).

        Returns:
            One to three column ranges, low to high importance.

        Raises:
            ConfigError: There is no such linear or stage.
        """
        from ptqbench.numerics.grid import ColumnRange

        linear = STAGE_LINEARS.get(name, (name,))[0]
        shapes = self.architecture.linear_shapes()
        if linear not in shapes:
            raise ConfigError(f"expected one of {[*STAGE_LINEARS, *shapes]}, got {name!r}")
        bits = self.spec.bitwidth.w_bits
        # Parts of this linear's inputs, low to high: none for down, those of all heads together for o, else of the hidden size.
        if linear in MLP_OUTPUT:
            widths, part_bits = (0, shapes[linear][1], 0), (self._down_bits(bits),) * 3
        elif linear in ATTENTION_OUTPUT:
            n_heads = self.architecture.n_heads
            lowest, bulk, high = self.layout.parts(self.architecture.head_dim)
            widths, part_bits = (n_heads * lowest, n_heads * bulk, n_heads * high), self.layout.bits(bits)
        else:
            widths, part_bits = self.layout.parts(shapes[linear][1]), self.layout.bits(bits)
        # One range of columns for each part that has any.
        ranges, start = [], 0
        for i, (width, its_bits) in enumerate(zip(widths, part_bits, strict=True)):
            if width:
                ranges.append(ColumnRange(start, start + width, self._grid_spec(its_bits, lowest=i == 0)))
            start += width
        return tuple(ranges)

    def _grid_spec(self, bits: int, lowest: bool) -> GridSpec:
        """The grid of one range of columns; a part of other bits has the format of that width beside the one asked for."""
        from ptqbench.numerics.grid_spec import GridSpec

        given, options = self.spec.bitwidth, dataclasses.asdict(self.spec.method.grid)
        name = of_width(given.w_format, bits) if bits < UNTOUCHED_BITS else INTEGER
        if name is None:
            raise UnsupportedError(no_format(given.w_format, bits))
        if name != INTEGER:
            rule = given.mx_scale if name == "mxfp4" or given.mx_scale != "four_thirds" else "even"
            search = options["scale_search"] if name == given.w_format else "none"
            return GridSpec(
                bits=bits, format=name, mx_scale=rule, clip_search=options["clip_search"], scale_search=search
            )
        del options["scale_search"]
        scheme = self._lowest_scheme() if lowest else options["scheme"]
        return GridSpec(bits=bits, group_size=given.group_size, **(options | {"scheme": scheme}))

    def _lowest_scheme(self) -> str:
        """The lowest weight part is asymmetric in the codes' GPTQ and like the rest in their RTN."""
        rounds_to_nearest = self.spec.method.solver.name == "rtn"
        return self.spec.method.grid.scheme if rounds_to_nearest else "asym"

    def _down_bits(self, bits: int) -> int:
        return max(bits, INT8) if self.layout.int8_down_proj else bits

    def block_plan(
        self,
        online: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        key_rotation: Tensor | None = None,
        basis_changes: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> BlockPlan | None:
        """Say what to install in a block.

        Args:
            online: Linear -> online transform of its input, before the quantizer.
            key_rotation: (G, e, e) rotation of keys and queries after RoPE; left out where keys have 16 bits.
            basis_changes: (d, d) changes of the residual basis before the attention and before the MLP is added.

        Returns:
            The plan, or None where the block stays stock.
        """
        from ptqbench.models.quantized import BasisChange, BlockPlan, InputPlan

        inputs: dict[str, InputPlan] = {}
        for linear in self.architecture.linear_shapes():
            # The parts of o are put together before a quantizer of whole tokens, or behind one of single heads.
            order = self.output_order() if linear in ATTENTION_OUTPUT else None
            per_head = linear in ATTENTION_OUTPUT and self.layout.output_per_head
            before, after = (None, order) if per_head else (order, None)
            plan = InputPlan(
                online=(online or {}).get(linear) if before is None else partial(_reordered, order=before),
                grid=self._input_grid(linear),
                n_groups=self.architecture.n_heads if per_head else self._input_groups(linear) or 1,
                order=after,
            )
            if plan.online is not None or plan.grid is not None or plan.order is not None:
                inputs[linear] = plan
        # Basis changes of the residual stream, then keys and values.
        grid, stored_bits = self._basis_change_grid(), self._basis_change_weight_bits()
        first, second = (None if matrix is None else BasisChange(matrix, grid, stored_bits) for matrix in basis_changes)
        kv = self._kv_plan(key_rotation)
        if not inputs and kv is None and first is None and second is None:
            return None
        changes: tuple[BasisChange | None, BasisChange | None] = (first, second)
        return BlockPlan(inputs=inputs, kv=kv, basis_changes=changes)

    def output_order(self) -> Tensor | None:
        """Order of o's input channels that puts the parts of all heads together; None where a head has one part."""
        from ptqbench.models.fuse import part_order

        parts = self.layout.parts(self.architecture.head_dim)
        return part_order(self.architecture.n_heads, parts) if sum(width > 0 for width in parts) > 1 else None

    def _grid(
        self, bits: int, width: int, *, contains_zero: bool, kv: bool = False, layout: Layout | None = None
    ) -> ActivationGrid | None:
        """Build a quantizer with the split of an axis that a layout asks for (the transform's); None for 16 bits."""
        from ptqbench.numerics.activation import ActivationGrid

        if bits >= UNTOUCHED_BITS:
            return None
        options, given, layout = self.spec.method.activation, self.spec.bitwidth, layout or self.layout
        lowest, _, high = layout.parts(width)
        lowest_bits, _, high_bits = layout.bits(bits)
        symmetric = options.kv_symmetric if kv else options.symmetric
        return ActivationGrid(
            bits=bits,
            symmetric=symmetric,
            zero_point="integer" if symmetric else options.zero_point,
            clip_ratio=options.kv_clip_ratio if kv else options.clip_ratio,
            range_contains_zero=contains_zero and options.range_contains_zero,
            high_bits=high_bits if high else None,
            n_high=high,
            lowest_bits=lowest_bits if lowest else None,
            n_lowest=lowest,
            format=given.kv_format if kv else given.a_format,
            mx_scale=given.mx_scale,
            static=kv or given.nv_input_scale == "static" or given.a_format != "nvfp4",
            one_level=not kv and given.nv_input_scale == "none",
        )

    def _uniform(self, bits: int, contains_zero: bool = True) -> ActivationGrid | None:
        return self._grid(bits, 0, contains_zero=contains_zero, layout=Layout())

    def _input_grid(self, linear: str) -> ActivationGrid | None:
        bits = self.spec.bitwidth.a_bits
        plain = self._input_groups(linear) is not None
        if linear in MLP_OUTPUT:
            return self._uniform(self._down_bits(bits), contains_zero=not plain)
        if linear not in ATTENTION_OUTPUT:
            return self._grid(bits, self.architecture.hidden_size, contains_zero=not plain)
        if self.layout.output_per_head:
            return self._grid(bits, self.architecture.head_dim, contains_zero=False)
        grid = self._grid(bits, self.architecture.head_dim, contains_zero=not plain)
        n_heads = self.architecture.n_heads
        return grid and dataclasses.replace(grid, n_high=n_heads * grid.n_high, n_lowest=n_heads * grid.n_lowest)

    def _input_groups(self, linear: str) -> int | None:
        """Number of groups that the input of a linear is cut into per token; None for no groups.

        The input of down_proj takes the group size where it divides, else as many groups as the hidden size has (QuaRot code).
        """
        size = self.spec.method.activation.group_size
        if size is None:
            return None
        width = self.architecture.linear_shapes()[linear][1]
        return width // size if width % size == 0 or linear not in MLP_OUTPUT else self.architecture.hidden_size // size

    def skip_reason(self) -> str | None:
        """Say why the formats of the bitwidth do not go with the method, or inputs not into the groups asked for, or None."""
        return format_reason(self.spec, self._widths) or self._group_reason()

    def _widths(self, bulk: int) -> list[int]:
        """The bits of all parts that there are, down_proj included."""
        shares = (self.layout.lowest_fraction, 1.0, self.layout.high_fraction)
        widths = [width for width, share in zip(self.layout.bits(bulk), shares, strict=True) if share]
        return [*widths, self._down_bits(bulk)]

    def _group_reason(self) -> str | None:
        size, bits = self.spec.method.activation.group_size, self.spec.bitwidth.a_bits
        if size is None or bits >= UNTOUCHED_BITS:
            return None
        if self.layout != dataclasses.replace(Layout(), int8_down_proj=self.layout.int8_down_proj):
            return (
                f"activation.group_size={size}: groups are not defined for inputs that are split into precision parts or grouped "
                "by head"
            )
        for linear, (_, width) in self.architecture.linear_shapes().items():
            groups = self._input_groups(linear) or 0
            if groups < 1 or width % groups or (linear not in MLP_OUTPUT and width % size):
                return f"activation.group_size={size} does not divide the {width} input channels of {linear}"
        return None

    def _basis_change_grid(self) -> ActivationGrid | None:
        """Integers, whatever the format of the bitwidth: the bits of basis changes are the method's own."""
        bits = self.spec.bitwidth
        if min(bits.a_bits, bits.v_bits) >= UNTOUCHED_BITS:
            return None
        grid = self._uniform(self.layout.basis_change_bits)
        return grid and dataclasses.replace(grid, format=INTEGER)

    def _basis_change_weight_bits(self) -> int:
        rounds = self.spec.bitwidth.w_bits < UNTOUCHED_BITS
        return self.layout.basis_change_weight_bits if rounds else UNTOUCHED_BITS

    def _kv_plan(self, key_rotation: Tensor | None) -> KvPlan | None:
        from ptqbench.models.quantized import KvPlan

        bits, head_dim = self.spec.bitwidth, self.architecture.head_dim
        if min(bits.k_bits, bits.v_bits) >= UNTOUCHED_BITS:
            return None
        return KvPlan(
            rotation=key_rotation if bits.k_bits < UNTOUCHED_BITS else None,
            key_grid=self._grid(bits.k_bits, head_dim, contains_zero=True, kv=True),
            value_grid=self._grid(bits.v_bits, head_dim, contains_zero=False, kv=True),
            k_group=self.spec.method.activation.k_group,
            rotation_bits=self.layout.key_rotation_bits,
            rope_output_bits=self.layout.rope_output_bits,
        )

    def storage_bits(self) -> StorageBits:
        """Account for what is stored: weight codes and their grids, basis changes, cached keys and values."""
        from ptqbench.numerics.grid import effective_bits, nominal_bits

        shapes = self.architecture.linear_shapes()
        grids = {name: self.weight_grid(name) for name in shapes}
        sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
        # d^2 numbers per basis change, and a scale per output channel where they are rounded, spread over the weights of a block.
        width, number_bits = self.architecture.hidden_size, self._basis_change_weight_bits()
        scales = width * GRID_NUMBER_BITS if number_bits < UNTOUCHED_BITS else 0
        change_bits = self.layout.basis_changes * (width**2 * number_bits + scales) / sum(sizes.values())
        low, high = self.layout.lowest_fraction, self.layout.high_fraction
        part_bits = self.layout.bits(self.spec.bitwidth.w_bits)
        blocks = self.kv_bits or ((self.spec.bitwidth.k_bits, self.spec.bitwidth.v_bits),)
        return StorageBits(
            nominal_w_bits=mean_bits(zip((low, 1 - low - high, high), part_bits, strict=True)),
            code_w_bits=mean_bits((sizes[name], nominal_bits(grid)) for name, grid in grids.items()),
            basis_change_w_bits=change_bits,
            effective_w_bits=mean_bits(
                (sizes[name], effective_bits(grid, shapes[name][0])) for name, grid in grids.items()
            )
            + change_bits,
            k_bits=mean(self._cached_bits(keys, self.spec.method.activation.k_group == "token") for keys, _ in blocks),
            v_bits=mean(self._cached_bits(values, shared=False) for _, values in blocks),
        )

    def _cached_bits(self, bits: int, shared: bool) -> float:
        """Bits per cached element: codes of the parts, and one grid per part and head (``shared``: per part and token)."""
        if bits >= UNTOUCHED_BITS:
            return float(UNTOUCHED_BITS)
        if self.spec.bitwidth.kv_format != INTEGER:
            return self._format_bits(bits)
        # Codes, and for each part a scale and (asymmetric) a zero point, spread over the elements that share them.
        parts = self.layout.parts(self.architecture.head_dim)
        numbers = 1 if self.spec.method.activation.kv_symmetric else 2
        width = self.architecture.kv_dim if shared else self.architecture.head_dim
        n_grids = sum(part > 0 for part in parts)
        codes = mean_bits(zip(parts, self.layout.bits(bits), strict=True))
        return codes + kv_overhead_bits(width, n_grids, numbers * GRID_NUMBER_BITS)

    def _format_bits(self, bits: int) -> float:
        """Bits per cached element in the format of keys and values: codes, and a scale per block of every part of a head."""
        spread = []
        for width, its_bits in zip(self.layout.parts(self.architecture.head_dim), self.layout.bits(bits), strict=True):
            if width:
                form = FORMATS[of_width(self.spec.bitwidth.kv_format, its_bits) or ""]
                blocks = -(-width // form.block) if form.block else 1
                spread.append((float(width), its_bits + blocks * form.bits_per_block / width))
        return mean_bits(spread)


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    """Put the channels (last axis) of the parts of all heads together."""
    return x.index_select(-1, order.to(x.device))
