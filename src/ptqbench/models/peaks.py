"""What quantizers must know from the calibration: the largest magnitudes, for formats with a number per tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ptqbench.models.kv import KvQuantizer
from ptqbench.models.quantized import QuantizedLinear, ResidualChange, set_quantizers

PEAKS = ("peaks", "key_peaks", "value_peaks")


@contextmanager
def observing(block: nn.Module) -> Iterator[None]:
    """Find the ``peaks`` of all quantizers of a block that need them, while it runs without rounding anything."""
    modules = [
        module for module in block.modules() if isinstance(module, QuantizedLinear | ResidualChange | KvQuantizer)
    ]
    states = [module.enabled for module in modules]
    set_quantizers(block, False)
    for module in modules:
        if not isinstance(module, ResidualChange):
            module.observing = module.needs_peaks
    try:
        yield
    finally:
        for module, enabled in zip(modules, states, strict=True):
            module.enabled = enabled
            if not isinstance(module, ResidualChange):
                module.observing = False


def needs_peaks(block: nn.Module) -> bool:
    """Whether a quantizer of a block needs the largest magnitudes on the calibration tokens."""
    return any(isinstance(module, QuantizedLinear | KvQuantizer) and module.needs_peaks for module in block.modules())


def peaks_of(block: nn.Module) -> dict[str, Tensor]:
    """Return what was observed in a block, by the name of the buffer."""
    return {
        name: buffer for name, buffer in block.named_buffers(remove_duplicate=False) if name.rpartition(".")[2] in PEAKS
    }
