"""How one range of columns is quantized: bits, scheme, groups and the rule of the range. It imports no torch.

Source: IST-DASLab/gptq@2d65066 (``asym``, ``sym_gptq``), spcl/QuaRot@5008669 (``sym_signed``).
"""

from __future__ import annotations

from dataclasses import dataclass

from ptqbench.errors import ConfigError, UnsupportedError
from ptqbench.numerics.checks import require_choice

SCHEMES = ("asym", "sym_gptq", "sym_signed")
UNTOUCHED_BITS = 16


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
    """

    bits: int
    scheme: str = "asym"
    group_size: int | None = None
    clip_search: bool = False
    sym_nonnegative_row: str = "symmetric"
    range_contains_zero: bool = True
    zero_point: str = "integer"
    clip_ratio: float = 1.0

    def __post_init__(self) -> None:
        """Reject impossible values where they are written down."""
        require_choice("scheme", self.scheme, SCHEMES)
        require_choice("sym_nonnegative_row", self.sym_nonnegative_row, ("symmetric", "as_code"))
        require_choice("zero_point", self.zero_point, ("integer", "real"))
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
        return code_limits(self.bits, signed=self.scheme == "sym_signed")


def code_limits(bits: int, signed: bool) -> tuple[int, int]:
    """Return the smallest and the largest integer of ``bits`` bits, signed (two's complement) or unsigned."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
