"""Named perplexity protocols: which split, how documents are joined, which windows, what happens to the tail.

One text has several perplexities in the literature, so a figure without its protocol cannot be compared. The definitions are
those of the GPTQ code (IST-DASLab/gptq@2d65066, ``datautils.py``), whose loaders nearly all later codes copied. In all of them
windows do not overlap, each window predicts its tokens 2..seq_len, no window gets a BOS token of its own, and a tail shorter than a
window is dropped. Imports neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses

from ptqbench.cell.spec import PerplexitySpec, nearest
from ptqbench.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a text becomes windows.

    Attributes:
        datasets: Data sets that it is defined for.
        split: The split it reads; None if the data set has no splits or any split may be taken.
        join: The string that joins the documents before they are tokenized as one text, with the special tokens that the
            tokenizer adds (a BOS token at the very start only). None: each document is tokenized alone and opens with the BOS
            token if there is one.
        first_documents: How many documents are read; None for all.
        max_windows: How many windows are kept; None for all.
        sampled: Windows are random crops of single documents (Python ``random``, seed 0) rather than consecutive.
        source: The codes and papers that use it.
    """

    datasets: tuple[str, ...]
    split: str | None
    join: str | None
    first_documents: int | None = None
    max_windows: int | None = None
    sampled: bool = False
    source: str = ""


PROTOCOLS = {
    "wikitext2": Protocol(("wikitext2",), "test", "\n\n", source="all papers"),
    "c4_sampled": Protocol(
        ("c4",), "validation", None, max_windows=256, sampled=True,
        source="get_c4: GPTQ, LoaQ, Q2N",
    ),
    "c4_joined": Protocol(
        ("c4",), "validation", " ", first_documents=1100, max_windows=256,
        source="get_c4_new: GPTQ (camera-ready), PB-LLM",
    ),
    "ptb_validation": Protocol(("ptb",), "validation", "\n\n", source="get_ptb: GPTQ, Q2N"),
    "ptb_test": Protocol(("ptb",), "test", " ", source="get_ptb_new: GPTQ (camera-ready), PB-LLM"),
    "documents": Protocol(("tiny", "file"), None, None, source="ptqbench, for texts of one's own"),
}  # fmt: skip
MAX_DRAWS = 5000
"""Documents drawn for one crop before giving up."""


def complete(spec: PerplexitySpec, where: str = "evaluation.texts") -> PerplexitySpec:
    """Fill in the protocol of a text, if its data set has only one, and the split that the protocol reads.

    Raises:
        ConfigError: No protocol is named and the data set has several, or the named one is unknown or belongs to another data
            set or split.
    """
    fitting = [name for name, protocol in PROTOCOLS.items() if spec.dataset in protocol.datasets]
    name = spec.protocol
    if name is None:
        if len(fitting) > 1:
            raise ConfigError(
                f"{where}: papers measure {spec.dataset!r} by {len(fitting)} protocols that differ; "
                f"choose one with protocol={' or protocol='.join(fitting)}"
            )
        if not fitting:
            return spec  # an unknown data set: the loader of texts names the known ones
        name = fitting[0]
    if name not in PROTOCOLS:
        raise ConfigError(f"{where}: unknown protocol {name!r}; {nearest(name, PROTOCOLS)}")
    protocol = PROTOCOLS[name]
    if name not in fitting:
        raise ConfigError(
            f"{where}: protocol {name!r} is for {' or '.join(protocol.datasets)}, not for {spec.dataset!r}"
        )
    if protocol.split is not None and spec.split not in (None, protocol.split):
        raise ConfigError(f"{where}: protocol {name!r} reads the {protocol.split} split, got split={spec.split}")
    return dataclasses.replace(spec, protocol=name, split=protocol.split or spec.split)
