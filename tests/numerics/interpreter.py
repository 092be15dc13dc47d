"""Can the column kernel run here: on a GPU, or in triton's interpreter, which has to suit the installed numpy?"""

from __future__ import annotations

import importlib.util
import os

import torch

INSTALLED = importlib.util.find_spec("triton") is not None
if INSTALLED:
    import triton
    import triton.language as tl


def obstacle() -> str:
    """Say why not, in words; empty if it can. Our kernel is not part of the question, so its faults stay visible."""
    if not INSTALLED:
        return "needs triton"
    if torch.cuda.is_available():
        return ""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a GPU or TRITON_INTERPRET=1"
    try:
        _count()
    except Exception as error:
        return f"the interpreter of this triton fails on a loop (3.6 does with numpy 2.5): {error}"
    return ""


def _count() -> None:
    """Run a loop over a run-time length: the interpreter turns an array of one number into an index."""
    total = torch.zeros(1)
    triton.jit(_turns)[(1,)](total, 3)
    assert total.item() == 3, "three turns counted wrongly"


def _turns(total, length):
    for _ in range(length):
        tl.store(total, tl.load(total) + 1)
