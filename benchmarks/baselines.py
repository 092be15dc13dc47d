"""What other code does for the same job, to be timed beside ptqbench: the textbook GPTQ loop, llmcompressor, gptqmodel.

The textbook is written here in the form in which the method is usually shipped: the block is run once per group of linears with
hooks that accumulate a Hessian for every linear, each linear is rounded column by column, and the block is run once more for the
inputs of the next: five block runs. It shares nothing with the package but the model's installed modeling code.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GROUPS = (
    ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"),
    ("self_attn.o_proj",),
    ("mlp.up_proj", "mlp.gate_proj"),
    ("mlp.down_proj",),
)
Check = Callable[[Tensor, Tensor, Tensor], None]
"""Given the weight of a linear (out, in), its Hessian (in, in) and the codes (out, in) that the textbook chose."""


class _Linear:
    """Hessian and rounding of one linear, asymmetric grid, consecutive groups."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear, self.samples = linear, 0
        width = linear.in_features
        self.hessian = torch.zeros(width, width, device=linear.weight.device)

    def add(self, inputs: Tensor) -> None:
        batch = len(inputs)
        x = inputs.reshape(-1, inputs.shape[-1]).t()
        self.hessian *= self.samples / (self.samples + batch)
        self.samples += batch
        x = (2 / self.samples) ** 0.5 * x.float()
        self.hessian += x.matmul(x.t())

    def round(self, bits: int, group_size: int, column_block: int = 128, damping: float = 0.01) -> Tensor:
        w, h, levels = self.linear.weight.data.clone().float(), self.hessian, 2**bits - 1
        dead = torch.diag(h) == 0
        h[dead, dead] = 1
        w[:, dead] = 0
        columns = w.shape[1]
        diagonal = torch.arange(columns, device=w.device)
        h[diagonal, diagonal] += damping * torch.mean(torch.diag(h))
        inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
        q_all, codes = torch.zeros_like(w), torch.zeros_like(w)
        for i1 in range(0, columns, column_block):
            i2 = min(i1 + column_block, columns)
            w1, inverse1 = w[:, i1:i2].clone(), inverse[i1:i2, i1:i2]
            errors = torch.zeros_like(w1)
            for i in range(i2 - i1):
                if (i1 + i) % group_size == 0:
                    group = w[:, i1 + i : i1 + i + group_size]
                    low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
                    scale = (high - low) / levels
                    zero = torch.round(-low / scale)
                column, d = w1[:, i], inverse1[i, i]
                code = torch.clamp(torch.round(column / scale) + zero, 0, levels)
                q = scale * (code - zero)
                q_all[:, i1 + i], codes[:, i1 + i] = q, code
                error = (column - q) / d
                w1[:, i:] -= error.unsqueeze(1).matmul(inverse1[i, i:].unsqueeze(0))
                errors[:, i] = error
            w[:, i2:] -= errors.matmul(inverse[i1:i2, i2:])
        self.linear.weight.data = q_all.to(self.linear.weight.dtype)
        return codes.to(torch.uint8)


@torch.no_grad()
def textbook(
    folder: Path, windows: Tensor, bits: int, group_size: int, device: str, check: Check | None = None
) -> None:
    """Quantize a checkpoint with GPTQ, true-sequential; ``check`` is shown every linear."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    decoder = model.model
    hidden = [decoder.embed_tokens(window[None]).to(device) for window in windows]
    positions = torch.arange(windows.shape[1], device=device)[None]
    rope = decoder.rotary_emb.to(device)(hidden[0], positions)
    for block in decoder.layers:
        block.to(device)
        for names in GROUPS:
            states = {name: _Linear(block.get_submodule(name)) for name in names}
            hooks = [
                s.linear.register_forward_hook(lambda _, inputs, __, s=s: s.add(inputs[0])) for s in states.values()
            ]
            for x in hidden:
                block(x, position_embeddings=rope)
            for hook in hooks:
                hook.remove()
            for state in states.values():
                weight, hessian = state.linear.weight.data, state.hessian.clone()
                codes = state.round(bits, group_size)
                if check is not None:
                    check(weight, hessian, codes)
        hidden = [block(x, position_embeddings=rope) for x in hidden]
        block.cpu()


@torch.no_grad()
def llmcompressor(folder: Path, windows: Tensor, bits: int, group_size: int, device: str) -> None:
    """Quantize with llmcompressor's GPTQ as its users do: a decoder layer at a time, its linears not in sequence."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device)
    weights = QuantizationArgs(num_bits=bits, group_size=group_size, strategy="group", symmetric=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    rows = {"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}
    length, count = windows.shape[1], len(windows)
    data = Dataset.from_dict(rows)
    with contextlib.chdir(folder):  # it leaves log files where it stands
        oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=length, num_calibration_samples=count)


def gptqmodel(folder: Path, windows: Tensor, bits: int, group_size: int, device: str) -> None:
    """Quantize with gptqmodel's GPTQ, true-sequential, no activation order."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it refuses to start with one
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=bits, group_size=group_size, desc_act=False, sym=False, true_sequential=True)
    model = GPTQModel.load(str(folder), config, device=device)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in windows]
    with contextlib.chdir(folder):  # as above
        model.quantize(rows, batch_size=1)
