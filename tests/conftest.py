"""Fixtures: small random checkpoints of the supported architectures, real data where it is at hand."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))  # the generator of the embedded corpus
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
torch.set_num_threads(1)
if (
    "PTQBENCH_CACHE" not in os.environ
):  # nothing of a person's own cache is read or written; processes of a run share one
    os.environ["PTQBENCH_CACHE"] = tempfile.mkdtemp(prefix="ptqbench-cache-")
    atexit.register(shutil.rmtree, os.environ["PTQBENCH_CACHE"], ignore_errors=True)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in Python; read when triton is first imported

REAL_DATA = Path(os.environ.get("PTQBENCH_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def random_checkpoint(folder: Path, kind: str = "llama", seed: int = 0, **changes: object) -> Path:
    """Save a random 2-block model of an architecture, with the tokenizer of the embedded model."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoTokenizer

    from ptqbench.models.source import embedded_model_folder

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_folder("tiny"))
    settings: dict[str, object] = dict(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=76, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, tie_word_embeddings=False,
        rms_norm_eps=1e-6, bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    settings |= changes
    if kind in ("qwen2", "phi3"):
        settings.pop("head_dim")
    config = CONFIG_MAPPING[kind](**settings)
    torch.manual_seed(seed)
    built = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)  # transformers starts biases at zero, which would hide a lost bias
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.15)
    built.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_cell_words(folder: Path, n_samples: int) -> list[str]:
    """Overrides of a cell of a random model of 2 blocks: windows of 16 tokens to calibrate on, a few for perplexity, no tasks."""
    text = folder / "text.txt"
    text.write_text("".join(f"The {a} cat saw {b} red birds.|" for a in range(20) for b in range(10)))
    return [
        "model=local", f"model.path={random_checkpoint(folder / 'model')}", "calibration=file", f"calibration.path={text}",
        "calibration.separator='|'", "calibration.portion=[0,0.8]", f"calibration.n_samples={n_samples}", "calibration.seq_len=16",
        "evaluation=file", f"evaluation.texts.file.path={text}", "evaluation.texts.file.separator='|'",
        "evaluation.texts.file.portion=[0.9,1]", "evaluation.texts.file.seq_len=16", f"execution.runs_dir={folder / 'runs'}",
    ]  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path):
    """A function that saves a random checkpoint in the test's folder: ``checkpoint("qwen3", head_dim=8)``."""
    return lambda kind="llama", **changes: random_checkpoint(tmp_path / f"{kind}-model", kind, **changes)


@pytest.fixture(scope="session")
def real_data():
    """The folder with a real pretrained model and real texts; skips where it is absent."""
    if not (REAL_DATA / "models" / "stories260K" / "config.json").is_file():
        pytest.skip(
            f"no models/stories260K in {REAL_DATA}: set PTQBENCH_TEST_DATA=FOLDER, which holds models/ and text/"
        )
    return REAL_DATA


@pytest.fixture
def small(tmp_path):
    """A small sweep on a random model in the test's folder, run by real processes."""
    from small_sweep import Small

    return Small(tmp_path, random_checkpoint)
