"""A GPU that is not there: tensors that claim to be on ``cuda:0``, compute on the CPU, and refuse what a real device refuses.

Enough to run whole cells on a machine without a GPU and find what usually breaks on the first one: operands on two devices, a
tensor that reaches numpy, a file or a tokenizer without being copied to the host, a factory that forgot its device. It knows no
kernels: nothing about speed, memory or the last digits of a real GPU is tested by it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda:0")
MIXED = {"copy_", "_to_copy", "set_"}
"""Operators that take operands of two devices."""
INDEXED = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}
"""Operators that take indices on the host for a tensor on the device."""


class OnGpu(Tensor):
    """A tensor that says it is on the GPU; its values are in ``held``, a CPU tensor."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            requires_grad=held.requires_grad,
        )
        made.held = held.detach()
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self) -> str:
        return f"OnGpu({self.held!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _function(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _check(func, args, kwargs)
        if func is torch.ops.aten.mm.dtype:  # products of half precision with float32 sums, which no CPU kernel has
            left, right, dtype = args
            return OnGpu(left.held.to(dtype) @ right.held.to(dtype))
        held = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if func._schema.name.endswith("_"):
            return args[0]
        if kwargs.get("out") is not None:
            return kwargs["out"]
        return tree_map(lambda value: OnGpu(value) if isinstance(value, Tensor) else value, held)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnGpu) else value


def _check(func: Any, args: Any, kwargs: Any) -> None:
    """Refuse operands on two devices, as torch does; numbers (0-dimensional tensors) may come from the host."""
    name = func._schema.name.split("::")[1]
    if name in MIXED:
        return
    if name in INDEXED and isinstance(args[0], OnGpu):
        args = (args[0], *args[2:])
    found = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    host = [value for value in found if not isinstance(value, OnGpu) and value.dim() > 0]
    if host and len(host) < len(found):
        shapes = [tuple(value.shape) for value in found]
        raise RuntimeError(
            f"Expected all tensors to be on the same device: {func} of {shapes}, {len(host)} of them on the CPU"
        )


def _function(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One call of torch's Python interface: placement is decided here, values below."""
    with torch._C.DisableTorchFunctionSubclass():
        if func in MOVES:
            return MOVES[func](*args, **kwargs)
        if func in OF_THE_DEVICE and isinstance(args[0], OnGpu):
            return OF_THE_DEVICE[func](args[0])
        if func is torch.nn.functional.scaled_dot_product_attention and kwargs.get("is_causal"):
            mask = _causal(args[0], args[1])  # torch would make it below this interface, on the CPU
            kwargs = {**kwargs, "is_causal": False, "attn_mask": mask}
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        device = kwargs["device"]
        asked = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if asked.type == "meta":
            return func(*args, **kwargs)
        onto = "cpu" if asked.type == "cuda" else asked
        made = func(*tree_map(_held, args), **tree_map(_held, {**kwargs, "device": onto}))
        return tree_map(OnGpu, made) if asked.type == "cuda" else made


def _causal(query: Tensor, key: Tensor) -> Tensor:
    ones = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    return OnGpu(ones) if isinstance(query, OnGpu) else ones


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return OnGpu(value.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _held(gradient)


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: OnGpu) -> Tensor:
        return value.held.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return OnGpu(gradient)


def _moved(value: Tensor, device: torch.device) -> Tensor:
    """Copy across, or the tensor itself if it is there."""
    if device.type == "cuda":
        return value if isinstance(value, OnGpu) or value.is_meta else _Up.apply(value)
    return _Down.apply(value) if isinstance(value, OnGpu) else value


def _to(value: Tensor, *args: Any, **kwargs: Any) -> Any:
    if "other" in kwargs or (args and isinstance(args[0], Tensor)):
        other = kwargs["other"] if "other" in kwargs else args[0]
        device, dtype = other.device, other.dtype
    else:
        copied = kwargs.pop("copy", False)
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        if copied:
            value = value.clone() if layout is None else value.clone(memory_format=layout)
    if device is not None and device.type == "meta":
        return _held(value).to("meta")
    if device is not None:
        value = _moved(value, device)
    return value if dtype is None else value.to(dtype)


def _refuse(value: OnGpu) -> Any:
    raise TypeError("can't take a tensor on cuda:0 where host memory is wanted; use Tensor.cpu() first")


MOVES = {
    Tensor.to: _to,
    Tensor.cpu: lambda value: _moved(value, torch.device("cpu")),
    Tensor.cuda: lambda value, *others: _moved(value, CUDA),
}
OF_THE_DEVICE = {
    Tensor.device.__get__: lambda value: CUDA,
    Tensor.is_cuda.__get__: lambda value: True,
    Tensor.is_cpu.__get__: lambda value: False,
    Tensor.tolist: lambda value: value.held.tolist(),
    **dict.fromkeys((Tensor.numpy, Tensor.__array__, Tensor.data_ptr, Tensor.untyped_storage), _refuse),
}


class _Everywhere(TorchFunctionMode):
    """Factories and moves of tensors that are not on the GPU yet."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _function(func, args, kwargs or {})


class _Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self._at = 0.0

    def record(self, stream: Any = None) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return 1000 * (other._at - self._at)


@contextlib.contextmanager
def simulated_gpu(free_bytes: int = 2**40) -> Iterator[None]:
    """Let this process see one GPU with so much free memory."""
    facts = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda index=0: "simulated",
        "mem_get_info": lambda device=None: (free_bytes, free_bytes),
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_device_capability": lambda device=None: (9, 0),
        "manual_seed_all": lambda seed: None,
        "Event": _Event,
    }
    with contextlib.ExitStack() as stack:
        for name, value in facts.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a module that moves gets new parameters
        stack.enter_context(_Everywhere())
        yield
