"""A checkpoint of which only the part in use is in memory: embedding, one decoder block, or the head.

The skeleton is the installed transformers class on the meta device. A part is read from safetensors when it is needed and dropped
afterwards, so the resident memory of a pass is one block, whatever the size of the model. While a block is in use, a thread reads
the next one from disk. The tensors of a part go through these steps: the edit of the checkpoint, the basis (in float64), the data
type of the model, the overlay of quantized weights, and the installation of online transforms and quantizers.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from ptqbench.errors import ConfigError, NumericalError
from ptqbench.models.architecture import Architecture
from ptqbench.models.family import FULL, SLIDING, TEXT_PARTS
from ptqbench.models.fuse import Basis
from ptqbench.models.source import ModelSource
from ptqbench.models.spread import place_of, places, spread
from ptqbench.models.stages import Positions
from ptqbench.models.unfused import split, take_apart
from ptqbench.numerics.orthogonal import generator

Overlay = Callable[[int, nn.Module], None]
TensorEdit = Callable[[dict[str, Tensor], int], dict[str, Tensor]]

STREAM_SHARE = 0.25
"""Share of the free memory of a GPU that residual streams may take between blocks."""
VOCABULARY_ROWS = 1 << 14
"""How many rows of the embedding or the output projection are in float64 at a time."""


class BlockwiseModel:
    """A causal language model that loads its parts on demand.

    Attributes:
        architecture: Dimensions.
        dtype: Floating-point type of all weights and of the residual stream.
        device: Where parts are materialised.
        basis: The equivalent form in which the checkpoint is loaded; None for the form in which it is stored.
        replicate: If not 0, embedded tokens are moved in their last place by signs drawn from this number.
    """

    def __init__(
        self,
        source: ModelSource,
        dtype: torch.dtype,
        device: torch.device,
        edit: TensorEdit | None = None,
        basis: Basis | None = None,
        replicate: int = 0,
    ) -> None:
        """Build the skeleton; no weight is read yet.

        Args:
            source: The checkpoint.
            dtype: Target floating-point type.
            device: Target device.
            edit: Function-preserving change of the tensors of a block (``tensors, block index -> tensors``), made before
                anything else, as if the edited tensors were stored.
            basis: Form in which the checkpoint is loaded; its embeddings are untied if the basis says so.
            replicate: 0, or the number of a replicate, for a model that calibrates.
        """
        self.source, self.dtype, self.device, self._edit, self.basis = source, dtype, device, edit, basis
        self.replicate = replicate
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None
        self.architecture: Architecture = source.architecture
        self._tied = self.architecture.tied_embeddings and not (basis and basis.unties)
        self.config, self._skeleton = _skeleton(source.folder, dtype, self._tied)
        for index in range(self.n_blocks):
            take_apart(self._skeleton.get_submodule(f"model.layers.{index}"), self.architecture)

    def reopened(self, basis: Basis | None, dtype: torch.dtype | None = None) -> BlockwiseModel:
        """Open the same checkpoint with the same edit in another basis, and in another data type if one is given."""
        return BlockwiseModel(self.source, dtype or self.dtype, self.device, self._edit, basis, self.replicate)

    def measured(self) -> BlockwiseModel:
        """The same model for evaluation, which sees the tokens as they are embedded."""
        if self.replicate == 0:
            return self
        return BlockwiseModel(self.source, self.dtype, self.device, self._edit, self.basis)

    @property
    def skeleton(self) -> PreTrainedModel:
        """The whole model without weights (device meta), for code that needs its class and configuration alone."""
        return self._skeleton

    @property
    def n_blocks(self) -> int:
        """Number of decoder blocks."""
        return self.architecture.n_blocks

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up token ids (batch, tokens) int64. Returns the residual stream (batch, tokens, hidden_size) on the CPU."""
        # Only rows of tokens that occur are moved to the basis and cast.
        used, places = tokens.unique(return_inverse=True)
        table = self._read_module("model.embed_tokens")["weight"]
        hidden = self._embedding(table[used]).cpu()[places]
        if self.architecture.family.scales_embedding:
            installed: Any = self._skeleton.get_submodule("model.embed_tokens")
            hidden = hidden * installed.embed_scale.to(hidden.dtype)
        if self.replicate == 0:
            return hidden
        # x (1 + s eps) with signs s, which all windows share: one unit in the last place, or two.
        draws = torch.rand(hidden.shape[1:], generator=generator(self.replicate, "replicate"))
        eps = torch.finfo(hidden.dtype).eps
        return hidden * torch.where(draws < 0.5, 1 - eps, 1 + eps).to(hidden.dtype)

    def positions(self, n_tokens: int) -> Positions:
        """Build the RoPE tables and the causal masks for windows of ``n_tokens``."""
        probe = torch.empty(1, n_tokens, self.architecture.hidden_size, dtype=self.dtype, device=self.device)
        ids = torch.arange(n_tokens, device=self.device)[None]

        def of(kind: str) -> Positions:
            build = create_sliding_window_causal_mask if kind == SLIDING else create_causal_mask
            mask = build(
                config=self.config, inputs_embeds=probe, attention_mask=None, past_key_values=None, position_ids=ids
            )
            return Positions(rope=self._rope(probe, ids, kind), mask=mask)

        return self._by_kind(of)

    def tree_positions(self, depth: Tensor, seen: Tensor) -> Positions:
        """Build the RoPE tables and the masks for rows that hold trees of tokens.

        Args:
            depth: (batch, tokens) int64, the position of each token in its sequence.
            seen: (batch, 1, tokens, tokens) bool, which tokens each token attends to.
        """
        depth, seen = depth.to(self.device), seen.to(self.device)
        probe = torch.empty(*depth.shape, 0, dtype=self.dtype, device=self.device)

        def of(kind: str) -> Positions:
            mask = seen
            if kind == SLIDING and self.architecture.window is not None:
                # Within a window w, a token at position p sees the positions p - w + 1 .. p of its sequence.
                mask = seen & (depth[:, None, None, :] > depth[:, None, :, None] - self.architecture.window)
            return Positions(rope=self._rope(probe, depth, kind), mask=mask)

        return self._by_kind(of)

    def _by_kind(self, of: Callable[[str], Positions]) -> Positions:
        """Build positions once for each kind of attention that the blocks have; those of block 0 are the common ones."""
        kinds = [self.architecture.attends(index) for index in range(self.n_blocks)]
        made = {kind: of(kind) for kind in dict.fromkeys(kinds)}
        others = {index: made[kind] for index, kind in enumerate(kinds) if kind != kinds[0]}
        return dataclasses.replace(made[kinds[0]], others=others)

    def _rope(self, like: Tensor, positions: Tensor, kind: str = FULL) -> tuple[Tensor, Tensor]:
        """Build cos and sin (batch, tokens, rotated channels) for positions (batch, tokens), with device and type of ``like``."""
        # A copy: a dynamic embedding keeps the longest window so far, which would change the tables of later windows.
        rotary = copy.deepcopy(self._skeleton.get_submodule("model.rotary_emb")).to(self.device)
        own = (kind,) if self.architecture.family.rope_by_kind else ()
        tables: tuple[Tensor, Tensor] = rotary(like, positions, *own)
        return tables

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Read the tensors of a block on the device, in the basis of the (edited) checkpoint."""
        tensors = self._read_block(index)
        if self._edit is not None:
            tensors = self._edit(tensors, index)
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def _read_block(self, index: int) -> dict[str, Tensor]:
        """Read a block, or take it from the reading thread, and let that thread read the next."""
        at, reading = self._ahead or (None, None)
        tensors = reading.result() if reading and at == index else self._read_from_disk(index)
        following = index + 1
        if following == self.n_blocks:
            self._ahead = None
        elif at != following:
            self._ahead = following, self._reader.submit(self._read_from_disk, following)
        return tensors

    def _read_from_disk(self, index: int) -> dict[str, Tensor]:
        """Read the tensors of a block, with fused linears cut into their parts."""
        stored = self._read(f"model.layers.{index}.", self.architecture.stored_block_shapes())
        return split(stored, self.architecture)

    def resting_place(self, hidden: Tensor, streams: int = 1) -> torch.device:
        """Choose where residual streams are kept between blocks: on the device if they take little of its memory, else on the host.

        Args:
            hidden: A residual stream, for its size and data type.
            streams: Number of streams.
        """
        fits = self._fits(streams * hidden.numel() * hidden.element_size())
        return self.device if fits else torch.device("cpu")

    def parking_place(self, hidden: Tensor, streams: int = 1) -> torch.device | None:
        """Choose where windows wait between the stages of a block: None for the device, if their widest inputs fit there."""
        width = (
            max(max(shape) for shape in self.architecture.linear_shapes().values()) + hidden.shape[-1]
        ) / hidden.shape[-1]
        needed = streams * width * hidden.numel() * hidden.element_size()
        return None if self.device.type != "cuda" or self._fits(needed) else torch.device("cpu")

    def _fits(self, needed: float) -> bool:
        """Whether the device is a GPU and ``needed`` bytes are at most ``STREAM_SHARE`` of its free memory."""
        return self.device.type == "cuda" and needed <= STREAM_SHARE * torch.cuda.mem_get_info(self.device)[0]

    @contextmanager
    def block(self, index: int, overlay: Overlay | None = None) -> Iterator[nn.Module]:
        """Hold one decoder block in memory; ``overlay`` may replace its weights, for example by quantized ones."""
        block = self._load_block(index, overlay)
        try:
            yield block
        finally:
            block.to("meta")

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Hold final norm and output projection: a function (..., hidden_size) -> logits (..., vocab_size).

        Logits are float32, or float64 where the model is.
        """
        norm, output = self._skeleton.get_submodule("model.norm"), self._skeleton.get_submodule("lm_head")
        tensors = self._head_tensors()
        self._fill(norm, {"weight": tensors["norm.weight"]})
        self._fill(output, {"weight": tensors["lm_head.weight"]})
        precision = torch.promote_types(self.dtype, torch.float32)
        cap = self.config.final_logit_softcapping if self.architecture.family.caps_logits else None

        def logits(hidden: Tensor) -> Tensor:
            found = nn.functional.linear(norm(hidden), output.weight)
            if cap is not None:
                found = torch.tanh(found / cap) * cap
            return found.to(precision)

        try:
            yield logits
        finally:
            norm.to("meta")
            output.to("meta")

    def materialise(self, overlay: Overlay | None = None) -> PreTrainedModel:
        """Load the whole model on its device, or on all visible GPUs if one does not hold it.

        Afterwards this object cannot load single blocks any more.
        """
        chosen = places(self._skeleton, self.device)
        table = self._read_module("model.embed_tokens")["weight"]
        self._fill(self._skeleton.get_submodule("model.embed_tokens"), {"weight": self._embedding(table)})
        head = self._head_tensors()
        self._fill(self._skeleton.get_submodule("model.norm"), {"weight": head["norm.weight"]})
        if not self._tied:
            self._fill(self._skeleton.get_submodule("lm_head"), {"weight": head["lm_head.weight"]})
        for index in range(self.n_blocks):
            name, block = f"model.layers.{index}", self._load_block(index, overlay)
            # A block leaves the first GPU at once, which would not hold all of them. What is offloaded moves at the end.
            place = place_of(name, chosen)
            self._skeleton.set_submodule(name, block if place == "disk" else block.to(place))  # type: ignore[arg-type]
        self._skeleton.tie_weights()
        # End tokens, repetition penalty and so on of a model that writes; as in from_pretrained, a file that is no JSON is ignored.
        with suppress(OSError):
            self._skeleton.generation_config = GenerationConfig.from_pretrained(self.source.folder)
        return spread(self._skeleton, chosen)

    def _load_block(self, index: int, overlay: Overlay | None) -> nn.Module:
        """Fill a copy of a block of the skeleton; the skeleton is not modified."""
        shared = self._skeleton.config  # one configuration for all blocks: installation switches attention there
        stock = self._skeleton.get_submodule(f"model.layers.{index}")
        block: nn.Module = copy.deepcopy(stock, {id(shared): shared})
        # edit -> basis (float64) -> data type of the model
        tensors = self.tensors(index)
        self._fill(block, tensors if self.basis is None else self.basis.block(tensors, index))
        del tensors
        # -> online transforms and quantizers -> quantized weights, and what quantizers know from the calibration
        plan = None if self.basis is None else self.basis.plan(index)
        if plan is not None:
            from ptqbench.models.quantized import install

            block = install(block, plan)
        if overlay is not None:
            overlay(index, block)
        return block

    def _fill(self, module: nn.Module, tensors: dict[str, Tensor]) -> None:
        placed = {key: self._cast(value) for key, value in tensors.items()}
        module.load_state_dict(placed, strict=True, assign=True)
        module.requires_grad_(False)

    def _embedding(self, rows: Tensor) -> Tensor:
        """Change basis and data type of embedding rows (rows, hidden_size)."""
        change = self.basis.embedding if self.basis is not None else dict
        pieces = [change({"weight": piece.to(self.device)})["weight"] for piece in rows.split(VOCABULARY_ROWS)]
        return torch.cat([self._cast(piece) for piece in pieces])

    def _cast(self, weight: Tensor) -> Tensor:
        """Move a finite weight to the device and the data type of the model.

        Raises:
            NumericalError: A value is beyond the range of the data type.
        """
        cast = weight.to(device=self.device, dtype=self.dtype)
        if self.dtype == torch.float16 and not bool(torch.isfinite(cast).all()):
            raise NumericalError(
                f"{self.source.folder}: a weight of size {float(weight.abs().max()):.3g} does not fit float16 (at most 65504); "
                f"give model.dtype=bfloat16 or float32"
            )
        return cast

    def _head_tensors(self) -> dict[str, Tensor]:
        """Read ``norm.weight`` and ``lm_head.weight`` (a clone of tied embeddings) and change their basis."""
        gain = self._read_module("model.norm")["weight"].to(self.device)
        table = self._read_module("model.embed_tokens" if self.architecture.tied_embeddings else "lm_head")["weight"]
        if self.basis is None:
            return {"norm.weight": gain, "lm_head.weight": table}
        changed_gain, pieces = gain, []
        # W <- W diag(g) T, a piece of the vocabulary at a time.
        for piece in table.split(VOCABULARY_ROWS):
            changed = self.basis.head({"norm.weight": gain, "lm_head.weight": piece.to(self.device)})
            changed_gain = changed["norm.weight"]
            pieces.append(self._cast(changed["lm_head.weight"]))
        return {"norm.weight": changed_gain, "lm_head.weight": torch.cat(pieces)}

    def _read_module(self, name: str) -> dict[str, Tensor]:
        state = self._skeleton.get_submodule(name).state_dict()
        return self._read(f"{name}.", {key: tuple(value.shape) for key, value in state.items()})

    def _read(self, prefix: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Read tensors by name, and check shape and finiteness of each. Every shard is mapped once and then closed."""
        tensors: dict[str, Tensor] = {}
        files: dict[Path, dict[str, str]] = {}
        for key in shapes:
            stored = self.source.tensors.get(prefix + key)
            if stored is None:
                raise ConfigError(f"{self.source.folder}: the weights lack tensor {prefix + key!r}")
            files.setdefault(stored.file, {})[key] = stored.name
        # Clone, because a tensor that points into the file keeps the whole shard mapped.
        for path, keys in files.items():
            try:
                with safe_open(path, framework="pt") as shard:
                    tensors |= {key: shard.get_tensor(name).clone() for key, name in keys.items()}
            except SafetensorError as error:
                raise ConfigError(f"{path}: cannot read the tensors of {prefix.rstrip('.')!r}: {error}") from None
            for key, name in keys.items():
                _check(tensors[key], shapes[key], f"{path}: tensor {name!r}")
        return tensors


def _skeleton(folder: Path, dtype: torch.dtype, tied: bool) -> tuple[Any, PreTrainedModel]:
    """Build the configuration and the installed class of a checkpoint, without weights.

    Raises:
        ConfigError: transformers does not take the configuration.
    """
    try:
        config: Any = AutoConfig.from_pretrained(folder)
        if config.model_type in TEXT_PARTS:
            config = config.text_config
        config._attn_implementation = "sdpa"
        config.tie_word_embeddings = tied
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # a wrong value in config.json surfaces as almost any type
        raise ConfigError(f"transformers cannot build a model from {folder / 'config.json'}: {error!r}") from error
    return config, model.eval()


def _check(tensor: Tensor, shape: tuple[int, ...], what: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ConfigError(f"{what} has shape {tuple(tensor.shape)}, config.json says {shape}")
    if not bool(torch.isfinite(tensor).all()):
        raise NumericalError(f"{what} holds NaN or infinity; the checkpoint is damaged")
