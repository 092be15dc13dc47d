"""What finished cells took, beside what was estimated: whether a time is normal. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ptqbench.cell.labels import bits_name
from ptqbench.engine.timings import EVALUATION_TIMINGS
from ptqbench.runs.files import number, read_record
from ptqbench.runs.folder import RunFolder
from ptqbench.sweeps.resources import STAGES, START_S, Needs

if TYPE_CHECKING:
    from ptqbench.cell.spec import RunSpec
    from ptqbench.models.architecture import Architecture

USUAL = 1.25
"""Up to this factor, in either direction, a time is as estimated."""
COLUMNS = ("cells", "", *STAGES, "altogether")
SMALL_S = 0.05
"""Seconds below which a stage counts as none."""


@dataclasses.dataclass(frozen=True)
class Took:
    """What a finished cell took.

    Attributes:
        shape: Shape of its model.
        device: Name of its GPU, else of its processor with the number of cores.
        seconds: Measured seconds of each of ``resources.STAGES``.
        estimated: What was estimated for each of them, seconds.
        peak_gib: Peak memory of the GPU for a cell on one, else of the host, GiB; None if not recorded.
    """

    shape: Architecture
    device: str
    seconds: tuple[float, ...]
    estimated: tuple[float, ...]
    peak_gib: float | None

    @property
    def ratio(self) -> float:
        """Measured / estimated time of the cell as a whole, the start of its process included in both."""
        return (START_S + sum(self.seconds)) / (START_S + sum(self.estimated))


def taken(folder: RunFolder, needs: Needs, shape: Architecture) -> Took | None:
    """Read what a finished cell took; None where that is not recorded, or the cell ran on another kind of device than planned."""
    result = folder.result() or {}
    timings, on_gpu = result.get("timings"), bool(needs.gpus)
    if not isinstance(timings, dict) or on_gpu != (result.get("peak_gpu_gib") is not None):
        return None
    seconds = {name: number(timings, name) for name in timings}
    if None in seconds.values():
        return None
    of_stage = dict.fromkeys(STAGES, 0.0)
    for name, value in seconds.items():
        stage = "bases" if name == "bases_s" else "evaluate" if name in EVALUATION_TIMINGS else "quantize"
        of_stage[stage] += value or 0.0
    attempts = folder.attempts
    meta = read_record(attempts[-1] / "meta.json") if attempts else {}
    gpu = meta.get("gpu")
    device = gpu.get("name") if isinstance(gpu, dict) else meta.get("cpu")
    peak = number(result, "peak_gpu_gib" if on_gpu else "peak_host_gib")
    return Took(shape, str(device or "unknown device"), tuple(of_stage.values()), needs.stages, peak)


def compared(finished: Iterable[tuple[RunSpec, Took]]) -> dict[str, list[tuple[str, ...]]]:
    """Compare the times of finished cells with their estimates, by device and by model (name and shape), method and bits.

    Args:
        finished: Cells with what they took.

    Returns:
        Lines by device; ``COLUMNS`` names the parts of a line. The seconds are medians, the words rest on the median ratio of the
        cells. Those that differ most from their estimate come first.
    """
    groups: dict[tuple[str, str, Architecture], list[Took]] = {}
    for spec, took in finished:
        name = f"{spec.model.name} {spec.method.name} {bits_name(spec.bitwidth)}"
        groups.setdefault((took.device, name, took.shape), []).append(took)
    ratios = {key: statistics.median(took.ratio for took in several) for key, several in groups.items()}
    lines: dict[str, list[tuple[str, ...]]] = {}
    for key in sorted(groups, key=lambda key: -abs(math.log(ratios[key]))):
        (device, name, _), several = key, groups[key]
        measured = (statistics.median(values) for values in zip(*(took.seconds for took in several), strict=True))
        estimated = (statistics.median(values) for values in zip(*(took.estimated for took in several), strict=True))
        pairs = [
            f"{_short(m)} / {_short(e)} s" if max(m, e) > SMALL_S else ""
            for m, e in zip(measured, estimated, strict=True)
        ]
        lines.setdefault(device, []).append((name, f"x{len(several)}", *pairs, in_words(ratios[key])))
    return lines


def _short(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds < 10 else f"{seconds:.0f}"


def in_words(ratio: float) -> str:
    """A ratio of a measured to an estimated time for people.

    >>> in_words(1.1), in_words(2.0), in_words(0.5)
    ('as estimated', '2.0 times as long', '0.5 times as long')
    """
    return (
        "as estimated"
        if 1 / USUAL <= ratio <= USUAL
        else f"{ratio:.2g} times as long"
        if ratio < 1
        else f"{ratio:.1f} times as long"
    )
