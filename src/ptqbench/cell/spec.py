"""The schema of a cell: one validated, frozen, JSON-able ``RunSpec``.

A field is either *identity* or *execution*. An identity field can change the numbers, so it enters the run id. An execution
field says where and how the same numbers are produced, or is a label. Both kinds are declared with ``cell.fields``; a test
asserts that every field carries its role. Imports neither torch nor hydra.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ptqbench.cell.bitwidth import KV_CHOICES as KV_CHOICES
from ptqbench.cell.bitwidth import BitwidthSpec as BitwidthSpec
from ptqbench.cell.fields import EXECUTION as EXECUTION
from ptqbench.cell.fields import IDENTITY as IDENTITY
from ptqbench.cell.fields import UNTOUCHED_BITS as UNTOUCHED_BITS
from ptqbench.cell.fields import Bits as Bits
from ptqbench.cell.fields import Fraction, Positive, execution, identity
from ptqbench.cell.fields import added as added
from ptqbench.cell.fields import left_at_default as left_at_default
from ptqbench.cell.validation import STRICT
from ptqbench.cell.validation import build as build
from ptqbench.cell.validation import may_hold as may_hold
from ptqbench.cell.validation import nearest as nearest
from ptqbench.cell.validation import strict as strict
from ptqbench.errors import ConfigError

MAX_TOKENS = 1 << 30
"""Limit of the tokens in all calibration windows: 8 GiB of token ids."""
Role = Literal["transform", "target", "solver", "refine"]
ROLES: tuple[Role, ...] = ("transform", "target", "solver", "refine")


@dataclass(frozen=True, config=STRICT)
class ModelSpec:
    """A checkpoint. ``digest`` identifies its content; name, hub id and path only say where to find it.

    ``outlier_channels`` > 0 multiplies that many norm gains by ``outlier_factor`` and divides the following weights by it. The
    function stays the same and gets outlier channels, which small models lack.
    """

    name: str = execution()
    hub_id: str | None = execution(default=None)
    revision: str | None = execution(default=None)
    path: str | None = execution(default=None)
    digest: str | None = identity(default=None)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = identity(default="auto")
    outlier_channels: Annotated[int, Field(ge=0)] = identity(default=0)
    outlier_factor: Annotated[float, Field(gt=0)] = identity(default=1.0)


@dataclass(frozen=True, config=STRICT)
class RoleSpec:
    """One member of a role, by registered name, with every hyper-parameter it has.

    ``files`` holds the paths of options that are files; ``options`` holds the digests of their content.
    """

    name: str = identity()
    options: dict[str, Any] = identity(default_factory=dict)
    files: dict[str, str] = execution(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class GridOptions:
    """The grid that weights are rounded to, without its bits (see ``numerics.grid``).

    ``clip_ratio`` is a fixed share of the range of every row or group; ``clip_search`` finds one instead.
    A bitwidth with a format of its own (``w_format``) has no scheme; of these options ``clip_search`` alone acts on it, or
    ``scale_search``, which is for formats (``numerics.scale_search``).
    """

    scheme: Literal["asym", "sym_gptq", "sym_signed"] = identity(default="asym")
    clip_search: bool = identity(default=False)
    sym_nonnegative_row: Literal["symmetric", "as_code"] = identity(default="symmetric")
    range_contains_zero: bool = identity(default=True)
    zero_point: Literal["integer", "real"] = identity(default="integer")
    clip_ratio: Annotated[float, Field(gt=0, le=1)] = added(1.0)
    scale_search: Literal["none", "exponent", "four_over_six", "scale_sweep", "fpq_mse"] = added("none")

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        if self.clip_search and self.clip_ratio != 1:
            raise ConfigError(
                f"method.grid: clip_search searches the share of the range that clip_ratio={self.clip_ratio:g} gives; choose one"
            )
        if self.clip_search and self.scale_search != "none":
            raise ConfigError(
                f"method.grid: clip_search and scale_search={self.scale_search} are two searches; choose one"
            )
        if self.scheme != "asym" and (self.zero_point == "real" or not self.range_contains_zero):
            raise ConfigError(
                "method.grid: range_contains_zero=false and zero_point=real belong to scheme=asym, "
                f"got scheme={self.scheme}; symmetric grids contain zero"
            )
        if self.clip_search and not self.range_contains_zero:
            raise ConfigError(
                "method.grid: clip_search shrinks both ends towards zero, so it needs range_contains_zero=true, got false"
            )


@dataclass(frozen=True, config=STRICT)
class ActivationOptions:
    """Dynamic quantizers of linear inputs (per token), keys and values (per token and head), without their bits.

    ``during_calibration`` keeps them active in the quantized stream while statistics are collected; QuaRot, ResQ and CoQuant
    calibrate without them. ``moment_input: plain`` takes statistics from inputs before their quantizer while the stream has it, as
    MR-GPTQ does. ``group_size`` input channels share a grid per token; null is one grid for all channels.
    ``zero_point`` concerns asymmetric quantizers: ``real`` subtracts the minimum, ``integer`` rounds the zero point.
    ``range_contains_zero=false`` gives asymmetric inputs and keys the plain minimum and maximum that values and groups have.
    """

    symmetric: bool = identity(default=False)
    clip_ratio: Annotated[float, Field(gt=0, le=1)] = identity(default=1.0)
    kv_symmetric: bool = identity(default=False)
    kv_clip_ratio: Annotated[float, Field(gt=0, le=1)] = identity(default=1.0)
    k_group: Literal["head", "token"] = identity(default="head")
    during_calibration: bool = identity(default=True)
    group_size: Positive | None = identity(default=None)
    zero_point: Literal["integer", "real"] = identity(default="integer")
    range_contains_zero: bool = added(True)
    moment_input: Literal["quantized", "plain"] = added("quantized")

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        if self.moment_input == "plain" and not self.during_calibration:
            raise ConfigError(
                "method.activation: moment_input=plain has no effect with during_calibration=false, which has no quantizers at all"
            )
        if self.symmetric and self.kv_symmetric and (self.zero_point == "real" or not self.range_contains_zero):
            given = "zero_point=real" if self.zero_point == "real" else "range_contains_zero=false"
            raise ConfigError(f"method.activation: {given} belongs to asymmetric quantizers, all are symmetric")


@dataclass(frozen=True, config=STRICT)
class MethodSpec:
    """A method: four roles, the grids, and whether the linears of a block are rounded in sequence."""

    name: str = execution()
    transform: RoleSpec = identity()
    target: RoleSpec = identity()
    solver: RoleSpec = identity()
    refine: RoleSpec = identity()
    grid: GridOptions = identity()
    activation: ActivationOptions = identity()
    true_sequential: bool = identity()


@dataclass(frozen=True, config=STRICT)
class TextSpec:
    """A text: a data set and split, or a file, and the portion of its documents that is read."""

    dataset: str = identity()
    split: str | None = identity(default=None)
    revision: str | None = execution(default=None)
    path: str | None = execution(default=None)
    separator: str | None = identity(default=None)
    portion: tuple[Fraction, Fraction] = identity(default=(0.0, 1.0))
    digest: str | None = identity(default=None)


@dataclass(frozen=True, config=STRICT)
class CalibrationSpec(TextSpec):
    """``n_samples`` windows of ``seq_len`` tokens, drawn from a text by ``sampling`` with the seed of the cell.

    If ``windows`` is given, the windows are read from that file instead, and ``digest`` identifies their token ids.
    """

    n_samples: Positive = identity(default=128)
    seq_len: Annotated[int, Field(ge=2)] = identity(default=2048)
    sampling: Literal["joined_random", "document_random"] = identity(default="joined_random")
    windows: str | None = execution(default=None)

    def __post_init__(self) -> None:
        """Refuse more windows than memory can hold."""
        if self.n_samples * self.seq_len > MAX_TOKENS:
            raise ConfigError(
                f"calibration.n_samples={self.n_samples} windows of calibration.seq_len={self.seq_len} are "
                f"{self.n_samples * self.seq_len} tokens, expected at most {MAX_TOKENS}; published methods take 128 x 2048"
            )


@dataclass(frozen=True, config=STRICT)
class PerplexitySpec(TextSpec):
    """Perplexity of a text in non-overlapping windows of ``seq_len`` tokens, by a named protocol (``data.protocols``)."""

    seq_len: Annotated[int, Field(ge=2)] = identity(default=2048)
    protocol: str | None = identity(default=None)


@dataclass(frozen=True, config=STRICT)
class EvaluationSpec:
    """What is measured: texts by label, and lm-eval tasks as ``task/metric``, which is also the name of their column.

    ``few_shot`` replaces lm-eval's number of examples in the prompt, by task. ``limit`` takes only the first examples of every
    task, to try things out. ``data_dir`` is a folder of task data as JSON lines, read instead of the hub; ``task_digests``
    identifies the data. ``ppl_dtype`` is the type of the logits and of the loss per token behind perplexities, whatever the type
    of the model. ``engine: whole`` is lm-eval's own class on the whole model in memory; ``blocks`` scores tasks block by block,
    for models that the device does not hold. ``generation_digest`` identifies the ``generation_config.json`` of the model, where
    it has one and a task lets the model write. ``fidelity`` also compares the model with its own unquantized one.
    """

    name: str = execution()
    texts: dict[str, PerplexitySpec] = identity(default_factory=dict)
    tasks: tuple[str, ...] = identity(default=())
    batch_size: Positive = identity(default=8)
    ppl_dtype: Literal["float32", "bfloat16"] = identity(default="float32")
    few_shot: dict[str, Annotated[int, Field(ge=0)]] = identity(default_factory=dict)
    limit: Positive | None = identity(default=None)
    data_dir: str | None = execution(default=None)
    task_digests: dict[str, str] = identity(default_factory=dict)
    engine: Literal["whole", "blocks"] = added("whole")
    generation_digest: str | None = added(None)
    fidelity: bool = added(False)

    def __post_init__(self) -> None:
        """Refuse options that contradict each other. Without a task the engine says nothing, and is no part of the identity."""
        if not self.tasks:
            object.__setattr__(self, "engine", "whole")
        elif self.fidelity and self.engine == "whole":
            raise ConfigError(
                "evaluation.fidelity=true compares answers of tasks with evaluation.engine=blocks, got engine=whole"
            )


@dataclass(frozen=True, config=STRICT)
class ExecutionSpec:
    """Where and how a cell runs. None of it may change a result.

    ``column_loop: plain`` keeps the solvers off the fused kernel on a GPU (``numerics.fused_columns``). ``beyond_context``
    permits windows that are longer than the context of the model.
    """

    runs_dir: Annotated[str, Field(min_length=1)] = execution(default="runs")
    device: Literal["auto", "cpu", "cuda"] = execution(default="auto")
    threads: Annotated[int, Field(ge=1, le=1024)] | None = execution(default=None)
    progress: bool = execution(default=True)
    keep_codes: bool | None = execution(default=None)
    artefacts_gib: Annotated[float, Field(ge=0, le=1e9)] = execution(default=64.0)
    column_loop: Literal["auto", "plain"] = execution(default="auto")
    beyond_context: bool = execution(default=False)


@dataclass(frozen=True, config=STRICT)
class ResourcesSpec:
    """The request of a job to the scheduler; null is derived from the model's shape and the method (``sweeps.resources``)."""

    gpus: Annotated[int, Field(ge=0)] | None = execution(default=None)
    gpu_mem_gib: Annotated[float, Field(gt=0)] | None = execution(default=None)
    host_mem_gib: Annotated[float, Field(gt=0)] | None = execution(default=None)
    cpus: Positive | None = execution(default=None)
    time_min: Positive | None = execution(default=None)


@dataclass(frozen=True, config=STRICT)
class LauncherSpec:
    """Who runs the cells of a sweep: SLURM, a pool of processes on this machine, this process, or nobody (``print``).

    ``auto`` is SLURM where ``sbatch`` is on PATH and this process is not inside a job already, else the local pool. ``on_done`` is
    a shell command that is run once when the sweep ends (``launch.ending``). ``exclude`` names nodes that get no cell; for
    ``forgive_h`` hours it also holds for nodes on which two cells failed (``launch.nodes``).
    """

    kind: Literal["auto", "slurm", "local", "inline", "print"] = execution(default="auto")
    wait: bool = execution(default=False)
    workers: Positive | None = execution(default=None)
    partition: str | None = execution(default=None)
    account: str | None = execution(default=None)
    qos: str | None = execution(default=None)
    constraint: str | None = execution(default=None)
    array_parallelism: Positive = execution(default=64)
    signal_delay_s: Positive = execution(default=300)
    max_requeues: Annotated[int, Field(ge=0)] = execution(default=50)
    setup: tuple[str, ...] = execution(default=())
    sbatch: dict[str, str | int | bool] = execution(default_factory=dict)
    exclude: tuple[str, ...] = execution(default=())
    forgive_h: Annotated[float, Field(ge=0)] = execution(default=24.0)
    mail: str | None = execution(default=None)
    on_done: str | None = execution(default=None)

    def __post_init__(self) -> None:
        """Refuse what would be found wrong only when the sweep has ended."""
        for node in self.exclude:
            if not re.fullmatch(r"[\w.-]+(\[[\d,-]+\][\w.-]*)?", node):
                raise ConfigError(
                    f"launcher.exclude: expected names of nodes, such as node7 or node[1-3], got {node!r}"
                )
        if self.mail is not None and not re.fullmatch(r"[^\s,@]+@[^\s,@]+", self.mail):
            raise ConfigError(f"launcher.mail: expected one address, such as name@example.org, got {self.mail!r}")
        try:
            empty = self.on_done is not None and not shlex.split(self.on_done)
        except ValueError as error:
            raise ConfigError(f"launcher.on_done: expected a shell command, got {self.on_done!r} ({error})") from None
        if empty:
            raise ConfigError("launcher.on_done: expected a shell command, got nothing; null is none")


@dataclass(frozen=True, config=STRICT)
class TrackingSpec:
    """Whether a cell appears in Weights & Biases while it runs, and where (``ptqbench.tracking``).

    ``group`` is the name of the sweep unless given. ``folder`` is the folder of W&B's own files; null is the run folder.
    """

    mode: Literal["none", "offline", "online"] = execution(default="none")
    project: str = execution(default="ptqbench")
    entity: str | None = execution(default=None)
    group: str | None = execution(default=None)
    tags: tuple[str, ...] = execution(default=())
    folder: str | None = execution(default=None)


@dataclass(frozen=True, config=STRICT)
class RunSpec:
    """One cell: model x method x bitwidth x calibration x evaluation x seed.

    ``replicate`` > 0 repeats the cell with the calibration stream moved in its last place, by signs drawn from that number. The
    replicates of a cell differ as its results differ between processors, whose sums run in another order.
    ``changed`` lists the paths of values that differ from the files that its parts are named after (see ``cell.labels``).
    """

    model: ModelSpec = identity()
    method: MethodSpec = identity()
    bitwidth: BitwidthSpec = identity()
    calibration: CalibrationSpec | None = identity()
    evaluation: EvaluationSpec = identity()
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = identity()
    resources: ResourcesSpec = execution(default_factory=ResourcesSpec)
    launcher: LauncherSpec = execution(default_factory=LauncherSpec)
    tracking: TrackingSpec = execution(default_factory=TrackingSpec)
    replicate: Annotated[int, Field(ge=0, le=2**31 - 1)] = added(0)
    changed: tuple[str, ...] = execution(default=())
    execution: ExecutionSpec = execution(default_factory=ExecutionSpec)  # last: from here on the name means the field

    @property
    def quantizes(self) -> bool:
        """Whether weights, activations, keys or values have fewer than 16 bits."""
        bits = self.bitwidth
        return min(bits.w_bits, bits.a_bits, bits.k_bits, bits.v_bits) < UNTOUCHED_BITS

    @property
    def calibrates(self) -> bool:
        """Whether calibration data can change a number: something is rounded, or a transform is applied."""
        return self.quantizes or self.method.transform.name != "none"


def to_dict(value: Any) -> Any:
    """Turn a spec (or any part of one) into plain JSON-able data."""
    return json.loads(json.dumps(dataclasses.asdict(value)))
