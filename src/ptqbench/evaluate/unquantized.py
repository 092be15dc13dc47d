"""What the unquantized model of a cell says, computed once for all cells that share model and data (``runs.artefacts``)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ptqbench.evaluate.fidelity import Divergence, Reference
from ptqbench.evaluate.loglikelihood import scorer
from ptqbench.evaluate.perplexity import perplexity
from ptqbench.evaluate.scores import Scores, SharedStore
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.runs.artefacts import Artefacts


@dataclasses.dataclass(frozen=True)
class Unquantized:
    """The checkpoint in its own basis, with nothing rounded.

    Attributes:
        quantized: The model of the cell, in whatever basis.
        key: What its logits are a function of, beside the tokens: plain data.
        artefacts: Where results are shared.
    """

    quantized: BlockwiseModel
    key: Mapping[str, Any]
    artefacts: Artefacts

    @functools.cached_property
    def model(self) -> BlockwiseModel:
        """The checkpoint, opened when it is needed."""
        return self.quantized.reopened(None)

    def of_text(self, windows: Tensor, on_block: Callable[[int], None]) -> dict[str, Tensor]:
        """What it predicts at every position of (n_windows, seq_len) windows, as ``fidelity.Reference.tensors``."""

        def make() -> dict[str, Tensor]:
            kept = Reference()
            perplexity(self.model, windows, batch_size=1, on_block=on_block, observe=kept)
            return kept.tensors()

        return self.artefacts.get("reference", self._key(windows), make)

    def noise(self, windows: Tensor, batch_size: int, on_block: Callable[[int], None]) -> float:
        """Mean KL divergence from itself where windows are run in other batches: what is below it is no difference."""

        def make() -> dict[str, Tensor]:
            found = Divergence(self.of_text(windows, on_block))
            perplexity(self.model, windows, batch_size=batch_size, on_block=on_block, observe=found)
            return {"kl": found.kl.mean()}

        return float(self.artefacts.get("noise", {**self._key(windows), "batch_size": batch_size}, make)["kl"])

    def scores(self, on_block: Callable[[int], None]) -> Scores:
        """What it makes of the requests of tasks."""
        return scorer(self.model, None, SharedStore(self.artefacts, self.key), on_block)

    def _key(self, windows: Tensor) -> dict[str, Any]:
        tokens = hashlib.sha256(windows.to(torch.int64).numpy().tobytes()).hexdigest()
        return {**self.key, "windows": tokens, "seq_len": windows.shape[1]}
