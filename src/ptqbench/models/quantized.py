"""Dynamic fake quantization of a live decoder block: linear inputs, keys and values, residual basis changes.

``install`` turns an installed decoder block into one that computes, for a linear,

    y = F.linear(reorder(quantize(online(x))), weight, bias)

and, where the residual stream changes its basis between the norms (of a family without norms behind attention and MLP),

    r = change_1(h);   h' = r + Attn(norm_1(h));   r' = change_2(h');   out = r' + MLP(norm_2(h')).

Nothing of the modeling code is copied: linears are exchanged under their own names, keys and values go through the
registered attention functions of `kv`, and basis changes need only the order of the four submodules. Every added tensor
is a non-persistent buffer and every weight keeps its name, so the state dictionary is that of the stock block.

The caller supplies weights that cancel the online transforms, orders, rotations and basis changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ptqbench.errors import ConfigError, UnsupportedError
from ptqbench.models.kv import KvPlan, KvQuantizer, check_kv, home, install_kv, larger, wrapped_attention
from ptqbench.numerics.activation import ActivationGrid, apply_grid, fake_quantize, part_peaks

__all__ = [
    "BasisChange",
    "BlockPlan",
    "InputPlan",
    "KvPlan",
    "PlannedLayer",
    "QuantizedLinear",
    "ResidualChange",
    "install",
    "set_quantizers",
    "wrapped_attention",
]


@dataclass(frozen=True)
class InputPlan:
    """How the input of one linear is prepared, in this order.

    Attributes:
        online: Transform (..., in) -> (..., in) that keeps the dtype (Hadamard of down_proj, head mixing of o_proj); it
            is active even where quantizers are off.
        grid: Quantizer; None or 16 bits: none.
        n_groups: Equal groups of the last axis with a grid each, per token (query heads for o_proj).
        order: (in,) int64 permutation of the channels, after quantization: ``x[..., order]``.
    """

    online: Callable[[Tensor], Tensor] | None = None
    grid: ActivationGrid | None = None
    n_groups: int = 1
    order: Tensor | None = None


@dataclass(frozen=True)
class BasisChange:
    """A change of basis of the residual branch: ``h -> quantize(h) @ matrix``.

    Attributes:
        matrix: (d, d), kept in the block's dtype once installed.
        grid: Quantizer of the input, per token; None or 16 bits: none.
        matrix_bits: Bits of the matrix, on a symmetric grid per output channel; 16 leaves it alone.
    """

    matrix: Tensor
    grid: ActivationGrid | None = None
    matrix_bits: int = 16


@dataclass(frozen=True)
class BlockPlan:
    """All quantizers and online transforms of one decoder block.

    Attributes:
        inputs: Name of a linear, such as ``mlp.down_proj`` -> plan. Other linears stay as they are.
        kv: Rotation and quantizers of keys and values.
        basis_changes: Before the attention residual and before the MLP residual.
    """

    inputs: Mapping[str, InputPlan] = field(default_factory=dict)
    kv: KvPlan | None = None
    basis_changes: tuple[BasisChange | None, BasisChange | None] = (None, None)


class _Prepared:
    """The prepared form of an input. It is kept while the input exists, so that q, k and v (gate and up) prepare it once."""

    def __init__(self) -> None:
        self._of: weakref.ref[Tensor] | None = None
        self._state: tuple[object, ...] = ()
        self._ready: Tensor | None = None

    def get(self, x: Tensor, enabled: bool, make: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``make(x)``, or the last result for the same unchanged tensor in the same state."""
        state = (enabled, None if x.is_inference() else x._version, torch.is_grad_enabled())
        if self._ready is not None and self._of is not None and self._of() is x and self._state == state:
            return self._ready
        ready = make(x)
        if ready is not x:
            self._of, self._state, self._ready = weakref.ref(x, self._forget), state, ready
        return ready

    def _forget(self, of: weakref.ref[Tensor]) -> None:
        if of is self._of:
            self._of = self._ready = None

    def __deepcopy__(self, memo: object) -> _Prepared:
        """Return an empty one: the copy of a block sees other inputs."""
        return _Prepared()


class QuantizedLinear(nn.Module):
    """A linear that prepares its input. It shares the ``weight`` and ``bias`` parameters of the linear that it replaces.

    Attributes:
        plan: What `prepare` does.
        enabled: Whether the quantizer is on.
        observing: Whether ``peaks`` are being found: the quantizer is off then.
        peaks: ``part_peaks`` of the calibration tokens for a grid that needs them; None while they are not known.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    order: Tensor | None
    peaks: Tensor | None

    def __init__(self, linear: nn.Linear, plan: InputPlan, prepared: _Prepared | None = None) -> None:
        """Take over the parameters of a linear.

        Args:
            linear: The replaced module, not modified; its parameters are shared.
            plan: What happens to the input.
            prepared: Shared by linears that have one plan and one input.
        """
        super().__init__()
        self._prepared = prepared or _Prepared()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.plan, self.enabled, self.observing = plan, True, False
        self.register_buffer("peaks", None, persistent=False)
        self.register_parameter("weight", linear.get_parameter("weight"))
        self.register_parameter("bias", linear.bias)
        order = None if plan.order is None else plan.order.to(home(linear.weight))
        self.register_buffer("order", order, persistent=False)

    def prepare(self, x: Tensor) -> Tensor:
        """Prepare the input of the matrix product.

        Args:
            x: (..., in), not modified.

        Returns:
            (..., in) in the dtype of x; x itself if the plan is empty. Do not modify it: it may be shared.
        """
        return self._prepare(x) if self.observing else self._prepared.get(x, self.enabled, self._prepare)

    def _prepare(self, x: Tensor) -> Tensor:
        # reorder(quantize(online(x)))
        if self.plan.online is not None:
            x = self.plan.online(x)
        if self.observing and self.plan.grid is not None:
            self.peaks = larger(self.peaks, part_peaks(x, self.plan.grid, self.plan.n_groups))
        elif self.enabled and self.plan.grid is not None:
            x = apply_grid(x, self.plan.grid, self.plan.n_groups, self.peaks)
        return x if self.order is None else x.index_select(-1, self.order)

    @property
    def needs_peaks(self) -> bool:
        """Whether the quantizer needs ``peaks``."""
        return self.plan.grid is not None and self.plan.grid.needs_peaks

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return nn.functional.linear(self.prepare(x), self.weight, self.bias)

    def extra_repr(self) -> str:
        """Describe the quantizer in ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, plan={self.plan}"


class ResidualChange(nn.Module):
    """The installed form of a `BasisChange`.

    Attributes:
        matrix: (d, d) in the dtype and on the device of the block.
        rounded: The same at the bits of its plan; None where that leaves it alone.
        enabled: Whether the quantizer is on. Without it the exact matrix is applied.
    """

    matrix: Tensor
    rounded: Tensor | None

    def __init__(self, change: BasisChange, like: Tensor) -> None:
        """Place the matrix beside the weights.

        Args:
            change: Matrix and grid.
            like: A parameter of the block; gives dtype and device.
        """
        super().__init__()
        self.grid, self.enabled = change.grid, True
        matrix = change.matrix.to(home(like))
        self.register_buffer("matrix", matrix.to(like.dtype), persistent=False)
        # h <- h M: column j of M makes output channel j and has a scale of its own.
        rounded = fake_quantize(matrix.mT, change.matrix_bits, symmetric=True).mT if change.matrix_bits < 16 else None
        self.register_buffer("rounded", None if rounded is None else rounded.to(like.dtype), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map the residual stream (..., d) to its new basis; hidden is not modified."""
        if not self.enabled:
            return hidden @ self.matrix
        hidden = hidden if self.grid is None else apply_grid(hidden, self.grid)
        return hidden @ (self.matrix if self.rounded is None else self.rounded)


class PlannedLayer(nn.Module):
    """A decoder layer whose residual branches change basis. The norms still read the unchanged stream.

    `install` gives the layer a class derived from this one and the stock class. Submodules, hooks and attributes stay as they
    are, and code that looks for the stock class (to record hidden states, for example) still finds it. Only ``forward`` differs.
    """

    basis_change_1: nn.Module | None
    basis_change_2: nn.Module | None

    @property
    def basis_changes(self) -> tuple[nn.Module | None, nn.Module | None]:
        """Modules (or None) applied to the residual before the attention and before the MLP is added."""
        return self.basis_change_1, self.basis_change_2

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run the layer, with the arguments and the result of the stock layer."""
        mixed, _ = self.get_submodule("self_attn")(
            hidden_states=self.get_submodule("input_layernorm")(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        # r = change_1(h); h' = r + Attn(norm_1(h))
        first, second = self.basis_changes
        hidden: Tensor = (hidden_states if first is None else first(hidden_states)) + mixed
        # r' = change_2(h'); out = r' + MLP(norm_2(h'))
        output: Tensor = self.get_submodule("mlp")(self.get_submodule("post_attention_layernorm")(hidden))
        return (hidden if second is None else second(hidden)) + output


def install(block: nn.Module, plan: BlockPlan) -> nn.Module:
    """Give a block a plan, with quantizers on. An earlier plan is removed.

    Args:
        block: Decoder layer of an installed class, modified in place; install after it has its final dtype and device
            (``block.to`` moves what was added too). With ``plan.kv`` the configuration that the blocks of a model share is
            switched to the wrapped attention function.
        plan: The plan; an empty one restores the stock block.

    Returns:
        The block itself; a `PlannedLayer` where the plan has basis changes.

    Raises:
        ConfigError: The plan names an unknown linear, or a tensor or grid in it does not fit. Nothing is changed then.
        UnsupportedError: Keys or values are to be quantized in an attention implementation other than sdpa and eager,
            or the basis of a block is to change whose ``forward`` was replaced (a block dispatched over devices).
    """
    # Refuse before anything is changed, then go back to the stock block.
    _check(block, plan)
    _strip(block)
    shared: dict[object, _Prepared] = {}
    # Exchange linears; those with the same input and plan share one prepared input.
    for name, input_plan in plan.inputs.items():
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        key = (linear.in_features, input_plan.grid, input_plan.n_groups, id(input_plan.online), id(input_plan.order))
        wrapped = QuantizedLinear(linear, input_plan, shared.setdefault(key, _Prepared()))
        block.set_submodule(name, _keep_mode(wrapped, linear))
    install_kv(block.get_submodule("self_attn"), plan.kv)
    if any(change is not None for change in plan.basis_changes):
        like = next(block.parameters())
        for index, change in enumerate(plan.basis_changes, start=1):
            module = None if change is None else _keep_mode(ResidualChange(change, like), block)
            block.register_module(f"basis_change_{index}", module)
        # A class of both: the stock layer with the forward of PlannedLayer.
        stock: Any = type(block)
        block.__class__ = _planned_class(stock)
    return block


def set_quantizers(block: nn.Module, enabled: bool) -> None:
    """Switch every quantizer on or off. Online transforms, orders, rotations and basis changes stay on.

    With quantizers off, the block computes the function of its transformed weights.

    Args:
        block: An installed block, or a whole model of them, modified.
        enabled: The new state.
    """
    for module in block.modules():
        if isinstance(module, QuantizedLinear | ResidualChange | KvQuantizer):
            module.enabled = enabled


def _check(block: nn.Module, plan: BlockPlan) -> None:
    """Refuse a plan that does not fit the block, before anything is changed."""
    linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear | QuantizedLinear)}
    for name, input_plan in plan.inputs.items():
        if name not in linears:
            raise ConfigError(f"expected the name of a linear in {sorted(linears)}, got {name!r} in the block plan")
        width, order = linears[name].in_features, input_plan.order
        if input_plan.n_groups < 1 or width % input_plan.n_groups:
            raise ConfigError(f"{name}: expected n_groups that divides {width} channels, got {input_plan.n_groups}")
        if input_plan.grid is not None:
            input_plan.grid.parts(width // input_plan.n_groups)
        if order is not None and (order.dtype != torch.int64 or sorted(order.tolist()) != list(range(width))):
            raise ConfigError(
                f"{name}: expected an int64 permutation of {width} channels, got another {order.dtype} tensor"
            )
    width = linears["mlp.down_proj"].out_features
    for index, change in enumerate(plan.basis_changes, start=1):
        if change is not None and change.matrix.shape != (width, width):
            raise ConfigError(
                f"expected a matrix of shape {(width, width)} in basis change {index}, got {tuple(change.matrix.shape)}"
            )
        if change is not None and change.grid is not None:
            change.grid.parts(width)
    if "forward" in vars(block) and any(plan.basis_changes):
        raise UnsupportedError(
            "expected a block whose forward is its class's, got one patched by a dispatcher; install first"
        )
    if plan.kv is not None:
        check_kv(block.get_submodule("self_attn"), plan.kv)


def _strip(block: nn.Module) -> None:
    """Restore the stock linears and the stock class; the plan of the attention stays."""
    for name, module in list(block.named_modules()):
        if isinstance(module, QuantizedLinear):
            bias = module.bias is not None
            linear = nn.Linear(module.in_features, module.out_features, bias, device="meta", dtype=module.weight.dtype)
            linear.weight = module.weight
            linear.register_parameter("bias", module.bias)
            block.set_submodule(name, _keep_mode(linear, module))
    if isinstance(block, PlannedLayer):
        del block.basis_change_1, block.basis_change_2
        block.__class__ = type(block).__bases__[1]


@lru_cache(maxsize=16)
def _planned_class(stock: type[Any]) -> type[nn.Module]:
    return type(f"Planned{stock.__name__}", (PlannedLayer, stock), {})


def _keep_mode(module: nn.Module, like: nn.Module) -> nn.Module:
    return module.train(like.training)
