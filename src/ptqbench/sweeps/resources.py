"""What a cell needs: GPU and host memory and time, estimated from the model's shape and the method. Imports no torch.

Shape legend: d hidden size, f FFN size, V vocabulary, L blocks, T tokens of a pass (windows x length), b bytes per stored value.

Memory follows the block pipeline (``docs/architecture.md``). The device holds one block in the checkpoint's type, and in float32
while it is rounded; a second moment (float32) with its factors for each input of linears; the activations of one window; and, up to
a limit, what all windows hold between two stages of a block. The host holds the residual streams of all windows, twice where the
cell is quantized (unquantized and quantized stream). A task that generates text needs the whole model on the device, and so do all
tasks with ``evaluation.engine=whole``. Where one GPU does not hold it, the model is spread over several of one node.

Time is the work of a cell (``engine.cost``) over a rate. The rates below say how they are known; ``plan`` corrects them by what the
finished cells of the same sweep took (``plan.calibrated``). The tokens of tasks are counted requests (``data.task_sizes``). What
``evaluation.fidelity`` adds is shared by all cells of a model, but every cell is planned as if it came first.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from ptqbench.cell.labels import counted
from ptqbench.cell.registry import create
from ptqbench.data.task_sizes import size_of
from ptqbench.engine.cost import work
from ptqbench.evaluate.scores import CHUNK_BYTES
from ptqbench.evaluate.task_files import generates
from ptqbench.methods.transform import Calibrated

if TYPE_CHECKING:
    from ptqbench.cell.spec import RunSpec
    from ptqbench.models.architecture import Architecture

GIB = 2**30
GPU_RATE = 60e12  # operations per second in 16-bit products on an 80 GB data-centre GPU: assumed, not measured
CPU_RATE = 20e9  # per core, float32, of whole cells of the embedded model: measured; a model of width 1024 reaches 63e9
MEMORY_RATE, CPU_MEMORY_RATE = 1.5e12, 2e10  # bytes of weights per second that a written token reads: assumed
BLOCK_S = 5e-4  # seconds per block and written token, whatever its size: assumed
READ_RATE = 1e9  # bytes per second from the checkpoint's file system: assumed
STAGES = ("bases", "quantize", "evaluate")
START_S = 10.0  # interpreter and imports
MARGIN = 1.3  # of memory
TIME_MARGIN = 3.0  # between the estimate and the time that is asked for
WAITING_BYTES = 20 * GIB  # of windows between the stages of a block; if they hold more, they wait on the host
GPU_SIZES = (24.0, 40.0, 48.0, 80.0, 141.0)
SPREAD_SIZE = 80.0  # of the GPUs over which a model is spread, unless resources.gpu_mem_gib says otherwise
SMALL_PARAMS = 50_000_000  # below this a GPU is not worth its queue
TEXT_TOKENS = {"wikitext2": 350_000, "ptb": 120_000, "c4": 530_000}
WRITTEN_TOKENS = 256  # per example of a task of unknown size: lm-eval's default
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a cell asks of the scheduler. Cells with equal needs, apart from the estimate, share a job array.

    Attributes:
        gpus: Number of GPUs: 0, 1, or as many as hold the whole model where it must be in memory.
        gpu_mem_gib: Peak memory of a GPU, GiB, 0 on the CPU.
        host_mem_gib: Peak host memory, GiB.
        cpus: CPU cores.
        time_min: Time limit, minutes: the estimate times a margin.
        estimate_min: Estimated duration, minutes.
        stages: Estimated seconds of each of ``STAGES``, as the rates give them.
    """

    gpus: int
    gpu_mem_gib: float
    host_mem_gib: float
    cpus: int
    time_min: int
    estimate_min: float
    stages: tuple[float, ...] = dataclasses.field(default=(), compare=False)

    def describe(self) -> str:
        """Say it in one line."""
        gpu = f"{self.gpus} GPU ({self.gpu_mem_gib:g} GiB)" if self.gpus else "CPU"
        return f"{gpu}, {counted(self.cpus, 'core')}, {self.host_mem_gib:g} GiB, {duration(self.time_min)}"


def needs(spec: RunSpec, architecture: Architecture) -> Needs:
    """Estimate what a cell needs; values given in ``resources`` take precedence.

    Args:
        spec: The resolved cell.
        architecture: Shape of its model.

    Returns:
        Memory and time in coarse steps, so that similar cells share an array.
    """
    given = spec.resources
    params = sum(math.prod(shape) for shape in architecture.tensor_shapes().values())
    gpu_mem, whole, host_mem = _memory(spec, architecture, params)
    # As many GPUs as hold the whole model, where a task needs it; one for everything else.
    gpus = given.gpus
    if gpus is None:
        spread = math.ceil(whole * MARGIN / (given.gpu_mem_gib or SPREAD_SIZE))
        gpus = max(1, spread) if spec.execution.device != "cpu" and params > SMALL_PARAMS else 0
    gpu_mem = max(gpu_mem, whole / max(gpus, 1))
    # On the CPU both are host memory.
    if not gpus:
        gpu_mem, host_mem = 0.0, host_mem + gpu_mem
    cpus = given.cpus or (8 if gpus else spec.execution.threads or 4)
    rates = (GPU_RATE, MEMORY_RATE) if gpus else (CPU_RATE * cpus, CPU_MEMORY_RATE)
    stages = _seconds(spec, architecture, params, *rates)
    minutes = (START_S + sum(stages)) / 60
    return Needs(
        gpus=gpus,
        gpu_mem_gib=given.gpu_mem_gib or (_step(gpu_mem * MARGIN, GPU_SIZES) if gpus else 0.0),
        host_mem_gib=given.host_mem_gib or _power(host_mem * MARGIN + 3.0),
        cpus=cpus,
        time_min=given.time_min or time_limit(minutes),
        estimate_min=minutes,
        stages=stages,
    )


def doubled(amount: Needs) -> Needs:
    """The same with twice the memory, for another try after running out of it."""
    larger = _step(amount.gpu_mem_gib * 1.01, GPU_SIZES) if amount.gpus else 0.0
    return dataclasses.replace(amount, gpu_mem_gib=larger, host_mem_gib=2 * amount.host_mem_gib)


def duration(minutes: float) -> str:
    """Write minutes for people: ``3 min``, ``2 h 05``, ``1 d 4 h``."""
    if minutes < 1:
        return f"{minutes * 60:.0f} s"
    if minutes < 60:
        return f"{minutes:.0f} min"
    hours, rest = divmod(round(minutes), 60)
    return f"{hours} h {rest:02d}" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def _memory(spec: RunSpec, architecture: Architecture, params: int) -> tuple[float, float, float]:
    """Peak memory in GiB: of the device block by block, of the whole model where a task needs it (else 0), of the host."""
    d, f, vocabulary = architecture.hidden_size, architecture.intermediate_size, architecture.vocab_size
    stored = BYTES[spec.model.dtype]
    # One block (stored and float32), the head's weights, and the float32 logits of a batch, of which 8192 rows are held at most.
    block = sum(math.prod(shape) for shape in architecture.block_shapes().values())
    length = max([text.seq_len for text in spec.evaluation.texts.values()] + [2])
    head = min(length * spec.evaluation.batch_size, 8192) * vocabulary * 4
    device = block * (stored + 4) + vocabulary * d * stored + head
    host = vocabulary * d * stored * (1 if architecture.tied_embeddings else 2) + block * 8
    # The residual stream of the longest text.
    streams = max((text_tokens(text.dataset) * d * stored for text in spec.evaluation.texts.values()), default=0)
    if spec.calibrates and spec.calibration is not None:
        # Windows between two stages, second moments with their factors, the activations of a window, and both streams.
        length = spec.calibration.seq_len
        waiting = spec.calibration.n_samples * length * (2 * d + f) * stored
        device += min(waiting, WAITING_BYTES)
        device += 3 * sum(width * width * 4 for width in (d, architecture.q_dim, d, f)) + length * (d * 6 + f * 3) * 4
        streams = max(streams, 2 * spec.calibration.n_samples * length * d * stored)
        # The pass of a transform over the unquantized float32 model.
        transform = create("transform", spec.method.transform)
        if isinstance(transform, Calibrated):
            streams = max(streams, transform.pass_streams * transform.n_samples * length * d * 4)
    # The residual streams of a chunk of task tokens.
    streamed = sum(_read(spec, task) for task in _tasks(spec) if not _needs_whole(spec, task))
    streams = max(streams, min(streamed * d * stored, CHUNK_BYTES))
    whole = params * stored + head if any(_needs_whole(spec, task) for task in _tasks(spec)) else 0
    return device / GIB, whole / GIB, (host + streams) / GIB


def _seconds(
    spec: RunSpec, architecture: Architecture, params: int, rate: float, memory_rate: float
) -> tuple[float, ...]:
    """Seconds of each of ``STAGES``."""
    evaluation, stored = spec.evaluation, BYTES[spec.model.dtype]
    texts = {label: text_tokens(text.dataset) for label, text in evaluation.texts.items()}
    flop = work(spec, architecture, texts).flop
    # The unquantized model is run twice over every text (reference, noise) and once over the tasks.
    more = int(evaluation.fidelity)
    bases, operations = flop.pop("bases", 0.0), flop.pop("perplexity", 0.0) * (1 + 2 * more)
    # Passes that read the checkpoint: each text is one, quantization two, each chunk of task tokens one.
    reads = 1.0 + (1 + 2 * more) * len(texts)
    chunks, writing = 0.0, 0.0
    for task in _tasks(spec):
        size, shots = size_of(task), evaluation.few_shot.get(task)
        if _needs_whole(spec, task):
            operations += 2.0 * params * _read(spec, task)
            # All examples of a batch are written together, one token a step.
            written = (size.written or WRITTEN_TOKENS) * generates(task)
            steps = written * math.ceil(size.measured(evaluation.limit) / evaluation.batch_size)
            writing += steps * (params * stored / memory_rate + architecture.n_blocks * BLOCK_S)
        else:
            operations += 2.0 * params * (1 + more) * _read(spec, task)
            chunks += size.requested(shots, evaluation.limit) * architecture.hidden_size * stored / CHUNK_BYTES
    reads += (1 + more) * math.ceil(chunks) + any(_needs_whole(spec, task) for task in _tasks(spec))
    read_s = params * stored / READ_RATE
    quantize = sum(flop.values()) / rate + 2 * spec.quantizes * read_s
    return bases / rate, quantize, operations / rate + writing + reads * read_s


def _tasks(spec: RunSpec) -> list[str]:
    return sorted({task.partition("/")[0] for task in spec.evaluation.tasks})


def _needs_whole(spec: RunSpec, task: str) -> bool:
    return spec.evaluation.engine == "whole" or generates(task)


def _read(spec: RunSpec, task: str) -> int:
    """Tokens of a task that pass through the model, without those that it writes."""
    evaluation = spec.evaluation
    shared = not _needs_whole(spec, task)
    return size_of(task).read(shared, evaluation.few_shot.get(task), evaluation.limit)


def text_tokens(dataset: str) -> int:
    """Rough number of tokens of a text by the name of its data set."""
    return TEXT_TOKENS.get(dataset, 100_000)


def _step(value: float, sizes: tuple[float, ...]) -> float:
    return next((size for size in sizes if value <= size), math.ceil(value))


def _power(gib: float) -> float:
    return float(2 ** math.ceil(math.log2(max(gib, 4.0))))


def time_limit(minutes: float) -> int:
    """Minutes to ask for where so many are expected."""
    return next((step for step in (30, 60, 120, 240, 480, 720, 1440) if minutes * TIME_MARGIN <= step), 2880)
