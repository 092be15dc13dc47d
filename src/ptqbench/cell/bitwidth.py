"""The bits of a cell. Imports neither torch nor hydra."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from ptqbench.cell.fields import UNTOUCHED_BITS, Bits, Positive, added, execution, identity
from ptqbench.cell.formats import INTEGER, FormatName
from ptqbench.cell.formats import check as check_formats
from ptqbench.cell.validation import STRICT
from ptqbench.errors import ConfigError

KV_CHOICES = (2, 3, 4, 6, 8)


@dataclass(frozen=True, config=STRICT)
class BitwidthSpec:
    """Bits of weights, activations, keys and values; 16 leaves a tensor untouched. ``group_size: null`` is one group per row.

    A format other than ``int`` has elements, blocks and scales of its own (``numerics.formats``). ``mx_scale`` is the rule for
    scales that are powers of two. ``nv_input_scale`` says whose maximum scales the blocks of NVFP4 inputs: that of the calibration
    tokens (``static``), of the ``token`` itself, or ``none``.
    With ``kv_measure``, keys and values of all blocks share the bits that ``k_bits`` and ``v_bits`` add up to, and each gets one of
    ``kv_choices``: the more, the larger it is (``engine.kv_bits``).
    """

    name: str = execution()
    w_bits: Bits = identity()
    a_bits: Bits = identity()
    k_bits: Bits = identity()
    v_bits: Bits = identity()
    group_size: Positive | None = identity(default=None)
    w_format: FormatName = added(INTEGER)
    a_format: FormatName = added(INTEGER)
    kv_format: FormatName = added(INTEGER)
    mx_scale: Literal["even", "floor", "rceil", "ceil", "four_thirds"] = added("even")
    nv_input_scale: Literal["static", "token", "none"] = added("static")
    kv_measure: Literal["activation", "weight_fro", "weight_spec"] | None = added(None)
    kv_choices: tuple[Bits, ...] = added(KV_CHOICES)

    def __post_init__(self) -> None:
        """Refuse values that contradict each other, and bits that no choice of them can add up to."""
        check_formats(self)
        if self.kv_measure is not None and self.kv_format != INTEGER:
            raise ConfigError(
                f"bitwidth.kv_measure={self.kv_measure} distributes the bits of integers, got bitwidth.kv_format={self.kv_format}"
            )
        choices, mean = list(self.kv_choices), (self.k_bits + self.v_bits) / 2
        if self.kv_measure is None and self.kv_choices != KV_CHOICES:
            raise ConfigError(f"bitwidth.kv_choices={choices} has no effect without bitwidth.kv_measure=activation")
        if choices != sorted(set(choices)) or not choices:
            raise ConfigError(f"bitwidth.kv_choices: expected different bits in ascending order, got {choices}")
        if self.kv_measure is not None and not choices[0] <= mean <= choices[-1] < UNTOUCHED_BITS:
            raise ConfigError(
                f"bitwidth.kv_measure: expected kv_choices below {UNTOUCHED_BITS} around the mean of k_bits={self.k_bits} and "
                f"v_bits={self.v_bits}, got {choices}"
            )
