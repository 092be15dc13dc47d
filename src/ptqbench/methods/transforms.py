"""Transforms: the basis in which a model is quantized.

A transform says how it splits the axes (``layout``), which grids follow for a cell (``precision``), and in which basis the
checkpoint is loaded (``basis``). Those of `methods.subspace` have eigenbases, which are computed first (``ptqbench.engine.bases``).
Random factors come from ``rotation_seed`` alone: the seed of the cell does not change them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from ptqbench.cell.spec import UNTOUCHED_BITS, added
from ptqbench.errors import ConfigError, UnsupportedError
from ptqbench.methods.layout import Layout
from ptqbench.methods.transform import FileMatrix, Transform, fixed_stream

if TYPE_CHECKING:
    from torch import Tensor

    from ptqbench.cell.spec import RunSpec
    from ptqbench.models.architecture import Architecture
    from ptqbench.models.fuse import Basis
    from ptqbench.numerics.hadamard import OddHadamard

Bits = Annotated[int, Field(ge=2, le=UNTOUCHED_BITS)]
Seed = Annotated[int, Field(ge=0)]


@dataclasses.dataclass(frozen=True)
class NoTransform(Transform):
    """Quantize in the basis of the checkpoint.

    Attributes:
        r3: Whether queries and keys are still rotated by a Hadamard after RoPE (online; installed where keys are quantized):
            what ResQ's and CoQuant's codes run as unrotated.
        output_group: Grids of the input of o: per ``token``, or per token and ``head`` (those codes).
    """

    r3: bool = added(False)
    output_group: Literal["token", "head"] = added("token")

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        """Skip heads without a Hadamard matrix, and activation groups that do not fit."""
        if self.r3 and spec.bitwidth.k_bits < UNTOUCHED_BITS and architecture.head_dim & (architecture.head_dim - 1):
            return f"r3 needs a head_dim that is a power of two, {spec.model.name} has {architecture.head_dim}"
        return self.precision(spec, architecture).skip_reason()

    def layout(self) -> Layout:
        """No split."""
        return Layout(output_per_head=self.output_group == "head")

    def basis(
        self, spec: RunSpec, architecture: Architecture, bases: Mapping[str, Tensor] | None = None
    ) -> Basis | None:
        """The checkpoint's own, with quantizers where activations, keys or values are quantized; else None."""
        from ptqbench.methods.basis import PlainBasis

        key = head_hadamard(architecture) if self.r3 and spec.bitwidth.k_bits < UNTOUCHED_BITS else None
        basis = PlainBasis(self.precision(spec, architecture, bases), key=key)
        return None if basis.plan(0) is None else basis


@dataclasses.dataclass(frozen=True)
class Hadamard(Transform):
    """Spread outliers by orthogonal matrices that cancel (QuaRot, arXiv 2404.00456).

    Attributes:
        r1: Rotation of the residual stream: a Hadamard with random signs, a Haar matrix, a bare Hadamard, or none.
        r2: Whether values are rotated per head (fused).
        r3: Whether queries and keys are rotated per head after RoPE (online; installed where keys are quantized).
        r4: Whether the input of down_proj is transformed (online).
        head_mix: ``hadamard`` transforms the input of o across heads (online), where a Hadamard matrix of their number exists
            (none of order 9 or 14 does); ``none`` leaves R2 fully fused.
        odd_hadamard: Rule for the odd factor of R1 and R4: ``paley`` builds it; ``table`` (QuaRot code) and ``as_code``
            (ResQ and CoQuant code) follow the codes' divisor lists. Head mixing always builds it.
        center_embedding: Subtract row means from the embedding (on in the code; changes an RMSNorm model).
        rotation_seed: Names the random factors.
        int8_down_proj: Weight and input of down_proj at 8 bits.
        rotation_file: Where ``r1: file`` and ``r2: file`` are read from (a checkpoint of SpinQuant's code, or safetensors with
            its names). The cell is identified by the content, not by the path.
        rotation_digest: Content of that file; filled in when a request is resolved.
        online_dtype: Arithmetic of the online transforms of o and down: ``float32``, or the type of the ``model``.
        output_group: Grids of the input of o: per ``token``, or per token and ``head`` (ResQ's code).
    """

    r1: Literal["random_hadamard", "haar", "hadamard", "none", "file"] = "random_hadamard"
    r2: bool | Literal["file"] = True
    r3: bool = True
    r4: bool = True
    head_mix: Literal["hadamard", "none"] = "hadamard"
    odd_hadamard: Literal["paley", "table", "as_code"] = "paley"
    center_embedding: bool = False
    rotation_seed: Seed = 0
    int8_down_proj: bool = False
    rotation_file: str | None = None
    rotation_digest: str | None = None
    online_dtype: Literal["float32", "model"] = "float32"
    output_group: Literal["token", "head"] = added("token")

    FILES: ClassVar[Mapping[str, str]] = {"rotation_file": "rotation_digest"}

    def __post_init__(self) -> None:
        """Refuse a file that is not used, or used and not given."""
        given = self.rotation_file is not None or self.rotation_digest is not None
        if given and "file" not in (self.r1, self.r2):
            raise ConfigError("method.transform: rotation_file is given but unused; say r1=file and/or r2=file")
        if "file" in (self.r1, self.r2) and not given:
            raise ConfigError("method.transform: r1=file and r2=file need method.transform.rotation_file=PATH")

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        """Skip widths for which no Hadamard matrix can be built."""
        shape, rule = architecture, self.odd_hadamard
        per_head = self.r2 is True or (self.r3 and spec.bitwidth.k_bits < UNTOUCHED_BITS)
        if per_head and shape.head_dim & (shape.head_dim - 1):
            return f"r2 and r3 need a head_dim that is a power of two, {spec.model.name} has {shape.head_dim}; set them to false"
        reason = None if self.r1 == "none" else fixed_stream(shape, f"r1={self.r1}", "set r1 to none")
        if self.r1 in ("random_hadamard", "hadamard"):
            reason = reason or no_hadamard(shape.hidden_size, rule, f"r1={self.r1} (hidden_size; haar works)")
        if self.r4:
            reason = reason or no_hadamard(shape.intermediate_size, rule, "r4 (intermediate_size)")
        return reason or self.precision(spec, architecture).skip_reason()

    def deviations(self, architecture: Architecture) -> list[str]:
        """Heads that no Hadamard matrix mixes are left unmixed."""
        if self.head_mix == "none" or self._mixed_heads(architecture) is not None:
            return []
        return [
            f"heads are not mixed: no Hadamard matrix of order {architecture.n_heads} exists or can be built; "
            "the other rotations are as published"
        ]

    def _mixed_heads(self, architecture: Architecture) -> int | None:
        n_heads = architecture.n_heads
        return n_heads if self.head_mix == "hadamard" and no_hadamard(n_heads, "paley", "heads") is None else None

    def layout(self) -> Layout:
        """No split; down_proj may have bits of its own."""
        return Layout(int8_down_proj=self.int8_down_proj, output_per_head=self.output_group == "head")

    def from_files(self, architecture: Architecture, held: Collection[str]) -> dict[str, FileMatrix]:
        """``residual`` (d, d) and ``l.heads`` (e, e) of block l, as far as they are wanted (names of SpinQuant's code)."""
        found: dict[str, FileMatrix] = {}
        if self.r1 == "file":
            found["residual"] = FileMatrix("R1", (architecture.hidden_size,) * 2)
        if self.r2 == "file":
            for index in range(architecture.n_blocks):
                name = f"model.layers.{index}.self_attn.R2"
                found[f"{index}.heads"] = FileMatrix(name, (architecture.head_dim,) * 2)
        return found

    def basis(self, spec: RunSpec, architecture: Architecture, bases: Mapping[str, Tensor] | None = None) -> Basis:
        """Draw the rotations.

        Args:
            spec: The cell.
            architecture: Dimensions.
            bases: What was read from ``rotation_file``: ``residual`` (d, d) and ``l.heads`` (e, e) of block l.

        Raises:
            ConfigError: Rotations are to come from a file that was not read.
            UnsupportedError: An order has no Hadamard matrix; `skip_reason` says so beforehand.
        """
        from ptqbench.methods.basis import HadamardBasis

        if "file" in (self.r1, self.r2) and bases is None:
            raise ConfigError("r1=file and r2=file need their rotations: read them first (ptqbench.engine.rotations)")
        # R2 and R3 are the Hadamard matrix of a head; R1 is drawn or read; head mixing and R4 run online.
        head = head_hadamard(architecture) if self.r2 is True or self.r3 else None
        return HadamardBasis(
            precision=self.precision(spec, architecture, bases),
            residual=bases["residual"] if self.r1 == "file" else self._residual(architecture.hidden_size),  # type: ignore[index]
            heads=head if self.r2 is True else None,
            key=head if self.r3 else None,
            mixed_heads=self._mixed_heads(architecture),
            down=down_transform(architecture, self.odd_hadamard, self.rotation_seed) if self.r4 else None,
            center_embedding=self.center_embedding,
            block_heads=bases if self.r2 == "file" else None,
            online_dtype=self.online_dtype,
        )

    def _residual(self, width: int) -> Tensor | None:
        import torch

        from ptqbench.numerics.hadamard import hadamard_transform
        from ptqbench.numerics.orthogonal import generator, haar, odd_factor

        draws = generator(self.rotation_seed, "r1")
        if self.r1 == "none":
            return None
        if self.r1 == "haar":
            return haar(width, draws)
        # diag(s) H^T / sqrt(d), signs s all 1 for the bare matrix.
        signs = torch.ones(width, dtype=torch.float64)
        if self.r1 == "random_hadamard":
            signs = 2.0 * torch.randint(0, 2, (width,), generator=draws) - 1
        factor = odd_factor(width, self.odd_hadamard, generator(self.rotation_seed, "r1 odd factor"))
        return hadamard_transform(torch.diag(signs.double()), odd_factor=factor)


def head_hadamard(architecture: Architecture) -> Tensor:
    """The Hadamard matrix of a head, (e, e) float64, orthogonal."""
    from ptqbench.numerics.hadamard import hadamard_matrix

    matrix: Tensor = hadamard_matrix(architecture.head_dim).double().T
    scale: float = architecture.head_dim**0.5
    return matrix / scale


def no_hadamard(order: int, rule: OddHadamard, what: str) -> str | None:
    """Say why there is no Hadamard matrix of an order, or None."""
    if order & (order - 1) == 0:
        return None
    from ptqbench.numerics.hadamard import factorise_order

    try:
        factorise_order(order, rule)
    except UnsupportedError as error:
        return f"{what}: {error}"
    return None


def down_transform(
    architecture: Architecture, rule: OddHadamard, seed: int, odd: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """Build the transform of down_proj's input, the same for its weight and for the activations that enter it.

    Args:
        architecture: Dimensions.
        rule: Which odd factor the width is split by.
        seed: Names the random factor that ``as_code`` draws for some widths.
        odd: (K, K) orthogonal odd factor that was given instead.
    """
    from functools import partial

    from ptqbench.numerics.hadamard import factorise_order, hadamard_transform
    from ptqbench.numerics.orthogonal import generator, odd_factor

    # width = K 2^k: a fast transform of order 2^k, and a dense odd factor of order K.
    width = architecture.intermediate_size
    if odd is not None:
        return partial(hadamard_transform, odd_factor=odd)
    if factorise_order(width, rule) == factorise_order(width, "paley"):
        return hadamard_transform  # the constructed factor is cached on the device
    return partial(hadamard_transform, odd_factor=odd_factor(width, rule, generator(seed, "down odd factor")))
