"""Classes of failures: what healing a launcher may try."""

import errno

import pytest
import torch
from safetensors import SafetensorError

from ptqbench.errors import (
    CalibrationError,
    ConfigError,
    NumericalError,
    StorageError,
    TimeLimitTooShort,
    UnsupportedError,
)
from ptqbench.runs.failures import KINDS, classify


def raised_by(action):
    with pytest.raises(BaseException) as caught:
        action()
    return caught.value


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConfigError("x"), "config"),
        (UnsupportedError("x"), "config"),
        (CalibrationError("x"), "config"),
        (NumericalError("x"), "numerical"),
        (TimeLimitTooShort("x"), "time_limit"),
        (MemoryError(), "host_memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "gpu_memory"),
        (OSError(errno.EIO, "Input/output error"), "disk"),
        (OSError(errno.EROFS, "Read-only file system"), "disk"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "disk"),
        (EOFError("Compressed file ended before the end-of-stream marker was reached"), "config"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "invalid start byte"), "config"),
        (RuntimeError("Found no NVIDIA driver on your system"), "config"),
        (ValueError("x"), "code"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "code"),
        (OSError(errno.EACCES, "Permission denied"), "config"),
    ],
)
def test_kinds(error, kind):
    assert classify(error).name == kind


def test_what_opening_the_users_files_raises_is_no_defect():
    assert classify(KeyError("gelu_strange"), "load").name == "config"
    assert classify(KeyError("gelu_strange"), "quantize").name == "code"


def test_the_cause_of_a_storage_error_says_its_kind():
    full = OSError(errno.ENOSPC, "No space left on device")
    error = StorageError.of(full, "the run folder x cannot be written")
    error.__cause__ = full
    assert classify(error).name == "disk"


def test_a_real_allocation_failure_of_torch_is_host_memory():
    assert classify(raised_by(lambda: torch.empty(1 << 55))).name == "host_memory"


def test_only_what_can_heal_is_tried_again():
    assert {name for name, kind in KINDS.items() if kind.retries == 0} == {"config", "numerical", "time_limit", "code"}
    assert {name for name, kind in KINDS.items() if kind.more_memory} == {"gpu_memory", "host_memory"}
