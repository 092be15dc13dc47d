"""Whole cells on a GPU that is not there: what is placed where, on a machine without one (`simulated_gpu`).

The arithmetic is that of the CPU, so a cell gives the same numbers to the last bit, but where the code chooses another way on
a GPU. What refuses an operand on the wrong device is tested first: else these tests would prove nothing.
"""

import contextlib
import functools
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from conftest import random_checkpoint
from ptqbench.engine import network_loss
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.numerics import fused_columns
from ptqbench.numerics.gptq import gptq
from ptqbench.numerics.grid import GridSpec, uniform_grid
from ptqbench.run import run_cell
from ptqbench.runs import folder as store
from ptqbench.sweeps.compose import compose_cell
from simulated_gpu import OnGpu, simulated_gpu

TEXT = "".join(f"the river carries boat {a} to the old town of {b} .|" for a in range(10) for b in range(10))
SMALL = [
    "model=local", "calibration=file", "calibration.separator='|'", "calibration.portion=[0,0.7]", "calibration.n_samples=2",
    "calibration.seq_len=32", "evaluation=file", "evaluation.texts.file.separator='|'", "evaluation.texts.file.portion=[0.7,1]",
    "evaluation.texts.file.seq_len=64", "execution.threads=1", "execution.column_loop=plain",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _columns_as_before(monkeypatch):
    monkeypatch.setattr(fused_columns, "_forbidden", False)  # a cell that forbids the kernel forbids it in this process


def test_what_a_gpu_refuses_is_refused():
    with simulated_gpu():
        there, here = torch.ones(3, 4).to("cuda"), torch.ones(3, 4)
        for mixed in (
            lambda: there + here,
            lambda: torch.cat([there, here]),
            lambda: here @ there.T,
            lambda: torch.ones(4)[torch.arange(2, device="cuda")],
            lambda: torch.nn.functional.linear(there, torch.nn.Linear(4, 2).weight),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        for host_only in (there.numpy, there.untyped_storage, lambda: json.dumps(there), lambda: there.__array__()):
            with pytest.raises(TypeError):
                host_only()


def test_placement_follows_operands_and_requests():
    with simulated_gpu():
        there = torch.ones(3, 4, device="cuda")
        on_gpu = (
            there * 2, there[0], there[torch.tensor([0, 2])], torch.zeros_like(there), there.new_zeros(2), there.double().sum(),
            torch.arange(3, device=there.device), torch.linalg.qr(there)[0], torch.nn.Linear(4, 2).to("cuda").weight,
            torch.tensor([1.0]).cuda(),
        )  # fmt: skip
        assert all(isinstance(tensor, OnGpu) and tensor.is_cuda and tensor.device.type == "cuda" for tensor in on_gpu)
        back = (there.cpu(), there.to("cpu"), torch.zeros_like(there, device="cpu"), torch.ones(2))
        assert not any(isinstance(tensor, OnGpu) or tensor.is_cuda for tensor in back)
        copy = there.to(torch.float32, copy=True)
        copy.zero_()
        assert (there.sum().item(), copy.sum().item()) == (12, 0)
        there.t()[0] = 5.0
        assert there[:, 0].tolist() == [5.0, 5.0, 5.0]


def test_gradients_cross_between_host_and_gpu():
    with simulated_gpu():
        leaf = torch.arange(3.0, requires_grad=True)
        (leaf.to("cuda").square().sum() * 2).cpu().backward()
        assert leaf.grad.tolist() == [0.0, 4.0, 8.0]


@functools.cache
def model(root):
    return random_checkpoint(root / "model")


def scores(tmp_path, words, device, free=2**40):
    """Run a cell; returns its scores, and where weights were put."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = [
        f"execution.device={device}",
        f"execution.runs_dir={tmp_path / device}",
        f"calibration.path={text}",
        f"evaluation.texts.file.path={text}",
        f"model.path={model(tmp_path)}",
    ]
    folder = store.create(compose_cell([*SMALL, *words, *options]))
    placed = set()
    fill = BlockwiseModel._fill

    def seen(self, module, tensors):
        fill(self, module, tensors)
        placed.update(parameter.device.type for parameter in module.parameters())

    with pytest.MonkeyPatch.context() as patch, simulated_gpu(free) if device == "cuda" else contextlib.nullcontext():
        patch.setattr(BlockwiseModel, "_fill", seen)
        run_cell(folder.read_spec(), folder)
    metrics = json.loads(folder.result_path.read_text())["metrics"]
    return {name: metric["value"] for name, metric in metrics.items()}, placed


@pytest.mark.parametrize(
    "words",
    [
        "+method=gptq bitwidth=w3 evaluation.tasks=[tiny_questions/acc] evaluation.limit=8",
        "+method=loaq bitwidth=w3",
        "+method=qronos bitwidth=w3 model.dtype=bfloat16",
        "+method=q2n bitwidth=w3 method.refine.moment=posavg",
        "+method=resq method.transform.n_samples=2 method/target=qep method/activation=resq_active",
        "+method=smoothquant method.transform.n_samples=2 method.transform.pairs=[qkv,o,gate_up,down]",
        "+method=awq method.transform.n_samples=2 method.transform.o=per_kv_head bitwidth.group_size=16",
        "+method=coquant method.transform.n_samples=2 model.dtype=bfloat16 evaluation.ppl_dtype=bfloat16",
    ],
)
def test_cell_is_that_of_the_cpu(tmp_path, words):
    here, on_cpu = scores(tmp_path, words.split(), "cpu")
    there, on_gpu = scores(tmp_path, words.split(), "cuda")
    assert (on_cpu, on_gpu) == ({"cpu"}, {"cuda"})
    assert there == here


def test_streams_rest_and_windows_park_on_the_host_where_the_gpu_is_small(tmp_path, monkeypatch):
    chosen = []
    for name in ("resting_place", "parking_place"):
        choose = getattr(BlockwiseModel, name)
        monkeypatch.setattr(
            BlockwiseModel, name, lambda self, *a, c=choose: [chosen.append(c(self, *a)), chosen[-1]][1]
        )
    words = ["+method=loaq", "bitwidth=w3"]
    roomy, _ = scores(tmp_path, words, "cuda")
    assert set(map(str, chosen)) == {"cuda", "None"}
    chosen.clear()
    shutil.rmtree(tmp_path / "cuda")
    tight, placed = scores(tmp_path, words, "cuda", free=1000)
    assert set(map(str, chosen)) == {"cpu"}
    assert placed == {"cuda"}
    assert tight == roomy


def test_rotations_are_learned_there(tmp_path, monkeypatch):
    monkeypatch.setattr(network_loss, "_repeatable_attention", lambda device: sdpa_kernel(SDPBackend.MATH))
    words = ["+method=spinquant", "method.transform.steps=1", "method.transform.quantize_weights=true"]
    here, _ = scores(tmp_path, words, "cpu")
    there, placed = scores(tmp_path, words, "cuda")
    assert placed == {"cuda"}
    assert there == here


def test_auto_hands_the_kernel_tensors_of_the_gpu_alone(monkeypatch):
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return self.launch

        def launch(self, weights, errors, values, codes, *others, **constants):
            seen.append(
                [isinstance(v, OnGpu) for v in (weights, errors, values, codes, *others) if isinstance(v, torch.Tensor)]
            )
            values.copy_(weights)
            errors.zero_()
            codes.zero_()

    kernels = SimpleNamespace(round_panel=Kernel(), INTERPRETED=False, VERSION="simulated")
    monkeypatch.setattr(fused_columns, "_has_triton", lambda: True)
    monkeypatch.setattr(fused_columns, "_kernels", lambda: kernels)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    weight, inputs = torch.randn(8, 32), torch.randn(100, 32)
    with simulated_gpu():
        result = gptq(weight.to("cuda"), (inputs.T @ inputs).to("cuda"), uniform_grid(32, GridSpec(4, group_size=8)))
    assert len(seen) >= 4
    assert all(all(there) and len(there) >= 10 for there in seen)
    assert result.stored.codes.is_cuda
    assert result.stored.scale.is_cuda
