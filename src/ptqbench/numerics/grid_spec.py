"""How one range of columns is quantized: bits, scheme or format, groups and the rule of the range. It imports no torch.

Source: IST-DASLab/gptq@2d65066 (``asym``, ``sym_gptq``), spcl/QuaRot@5008669 (``sym_signed``).
"""

from __future__ import annotations

from dataclasses import dataclass

from ptqbench.errors import ConfigError, UnsupportedError
from ptqbench.numerics.checks import require_choice
from ptqbench.numerics.formats import E4M3, FORMATS, INTEGER, MX_SCALES, SEARCHES, Format

SCHEMES = ("asym", "sym_gptq", "sym_signed")
UNTOUCHED_BITS = 16
SCALE_BITS = 16
"""Bits of one stored scale of an integer grid, and of a zero point that is not a code."""


@dataclass(frozen=True)
class GridSpec:
    """How one range of columns is quantized.

    Attributes:
        bits: Bits per code, 1..16; 16 leaves the columns untouched.
        scheme: ``asym``, ``sym_gptq`` or ``sym_signed`` (2 bits or more).
        group_size: Consecutive input channels sharing a scale; the last group of a range holds the remainder, also
            when ``group_size`` exceeds the range. ``None``: one group per row of the range.
        clip_search: Shrink the range of every row to the factor of least error (``numerics/clip_search.py``).
        sym_nonnegative_row: ``symmetric``, or ``as_code`` for the original treatment of such rows by ``sym_gptq``.
        range_contains_zero: Extend the range to zero where all values have one sign; ``asym`` alone may say False.
        zero_point: ``integer`` (rounded, so that zero is on the grid), or ``real`` (``asym`` alone).
        clip_ratio: Share of the range of every row that the grid spans, in (0, 1].
        format: ``int``, or a name of ``numerics/formats.py``, which has elements, blocks and scales of its own: there is no
            scheme and no zero point then, and ``group_size`` is None.
        mx_scale: Rule for scales that are powers of two.
        scale_search: ``none``, or how the scale of a block of a format is chosen (``numerics/scale_search.py``).
    """

    bits: int
    scheme: str = "asym"
    group_size: int | None = None
    clip_search: bool = False
    sym_nonnegative_row: str = "symmetric"
    range_contains_zero: bool = True
    zero_point: str = "integer"
    clip_ratio: float = 1.0
    format: str = INTEGER
    mx_scale: str = "even"
    scale_search: str = "none"

    def __post_init__(self) -> None:
        """Reject impossible values where they are written down."""
        require_choice("scheme", self.scheme, SCHEMES)
        require_choice("sym_nonnegative_row", self.sym_nonnegative_row, ("symmetric", "as_code"))
        require_choice("zero_point", self.zero_point, ("integer", "real"))
        require_choice("format", self.format, (INTEGER, *FORMATS))
        require_choice("mx_scale", self.mx_scale, MX_SCALES)
        require_choice("scale_search", self.scale_search, ("none", *SEARCHES))
        if self.format != INTEGER:
            self._check_format()
            return
        if self.scheme != "asym" and not self.plain:
            raise ConfigError(
                f"range_contains_zero=False and zero_point='real' belong to scheme asym, got scheme {self.scheme}"
            )
        if self.clip_search and not self.range_contains_zero:
            raise UnsupportedError(
                "clip_search: shrinks both ends towards zero, so it is not defined with range_contains_zero=False"
            )
        if not 0 < self.clip_ratio <= 1:
            raise ConfigError(f"clip_ratio: expected a share in (0, 1], got {self.clip_ratio}")
        if not 1 <= self.bits <= UNTOUCHED_BITS:
            raise ConfigError(f"bits: expected 1..{UNTOUCHED_BITS}, got {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(f"group_size: expected None or a positive integer, got {self.group_size}")
        if self.scheme == "sym_signed" and self.bits < 2:
            raise ConfigError("bits: expected 2..16 for scheme sym_signed (one bit leaves no positive code), got 1")

    def _check_format(self) -> None:
        if not self.plain or self.sym_nonnegative_row != "symmetric" or self.clip_ratio != 1:
            raise ConfigError(
                "range_contains_zero, zero_point, sym_nonnegative_row and clip_ratio belong to integer grids: "
                f"{self.format} is symmetric and has scales of its own"
            )
        if self.group_size is not None:
            raise ConfigError(
                f"group_size: expected None, since {self.format} has its own blocks, got {self.group_size}"
            )
        if self.bits not in (self.own_format.elements.bits, UNTOUCHED_BITS):
            raise ConfigError(f"bits: expected {self.own_format.elements.bits} for {self.format}, got {self.bits}")
        if self.scale_search != "none" and (self.format not in SEARCHES[self.scale_search] or self.clip_search):
            raise ConfigError(
                f"scale_search={self.scale_search}: expected a format in {', '.join(SEARCHES[self.scale_search])} without "
                f"clip_search, got {self.format} with clip_search={self.clip_search}"
            )
        if self.mx_scale == "four_thirds" and self.format != "mxfp4":
            raise ConfigError(f"mx_scale=four_thirds: expected format mxfp4, got {self.format}")

    @property
    def integer(self) -> bool:
        """Whether codes are integers with a scale of 16 bits, not those of a format."""
        return self.format == INTEGER

    @property
    def own_format(self) -> Format:
        """The format; there is none for integers."""
        return FORMATS[self.format]

    @property
    def block(self) -> int | None:
        """Consecutive input channels that share a scale; None for all."""
        return self.group_size if self.integer else self.own_format.block

    @property
    def largest_scale(self) -> float:
        """The block scale of NVFP4 that the largest magnitude of the tensor gets before a search."""
        return 256.0 if self.scale_search in ("four_over_six", "scale_sweep") else E4M3.top

    @property
    def folds(self) -> bool:
        """Whether a scale can take up any factor of its row."""
        return self.integer or self.own_format.scale == "row"

    @property
    def bits_per_group(self) -> int:
        """Bits that are stored per row and group beside the codes: the scale and, on asymmetric grids, a zero point.

        A zero point has as many bits as a code, or 16 where it may lie outside the codes or between them. That of symmetric
        grids is a constant.
        """
        if self.untouched:
            return 0
        if not self.integer:
            return self.own_format.bits_per_block
        zero_bits = self.bits if self.plain else SCALE_BITS
        return SCALE_BITS + (zero_bits if self.scheme == "asym" else 0)

    @property
    def untouched(self) -> bool:
        """Whether columns of this grid keep their values."""
        return self.bits == UNTOUCHED_BITS

    @property
    def plain(self) -> bool:
        """Whether zero is a code, so that the zero point is an integer within the codes."""
        return self.range_contains_zero and self.zero_point == "integer"

    @property
    def code_limits(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        if not self.integer:
            return -int(self.own_format.elements.top), int(self.own_format.elements.top)
        return code_limits(self.bits, signed=self.scheme == "sym_signed")


def code_limits(bits: int, signed: bool) -> tuple[int, int]:
    """Return the smallest and the largest integer of ``bits`` bits, signed (two's complement) or unsigned."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
