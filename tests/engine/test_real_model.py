"""A real pretrained model on real text: what every correct implementation must see. Skipped where the data are absent."""

import functools

import pytest

from ptqbench.run import run_cell
from ptqbench.runs.folder import create
from ptqbench.sweeps.compose import compose_cell

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measure(tmp_path_factory, real_data):
    root, text = tmp_path_factory.mktemp("runs"), real_data / "text" / "tinystories.train_head.txt"

    @functools.cache
    def run(*words):
        spec = compose_cell(
            [
                "model=local", f"model.path={real_data / 'models' / 'stories260K'}", "calibration=file",
                f"calibration.path={text}", "calibration.separator='<|endoftext|>'", "calibration.portion=[0,0.8]",
                "calibration.n_samples=64", "calibration.seq_len=512", "evaluation=file", f"evaluation.texts.file.path={text}",
                "evaluation.texts.file.separator='<|endoftext|>'", "evaluation.texts.file.portion=[0.99,1]",
                "evaluation.texts.file.seq_len=512", f"execution.runs_dir={root}", "execution.threads=1", *words,
            ]
        )  # fmt: skip
        return run_cell(spec, create(spec))

    return run


def perplexity(result):
    return result["metrics"]["file/perplexity"]["value"]


def test_quality_falls_with_bits_as_on_every_trained_model(measure):
    full = perplexity(measure("+method=fp16"))
    w4, w3, w2 = (perplexity(measure("+method=rtn", f"bitwidth={bits}")) for bits in ("w4", "w3", "w2"))
    assert 3.9 < full < 5.2
    assert 1.05 < w4 / full < 1.25
    assert w3 / full > 2
    assert w2 > 200


@pytest.mark.parametrize("bitwidth", ["w3", "w2"])
def test_gptq_is_below_rounding_to_nearest(measure, bitwidth):
    gptq, rtn = (perplexity(measure(f"+method={m}", f"bitwidth={bitwidth}")) for m in ("gptq", "rtn"))
    assert gptq < 0.95 * rtn


@pytest.mark.parametrize("group_size", [32, 64, 100, 128, 500])
def test_every_group_size_serves_172_input_channels(measure, group_size):
    result = measure("+method=gptq", "bitwidth=w4", f"bitwidth.group_size={group_size}", "calibration.n_samples=16")
    assert perplexity(result) < 5.6
    groups = lambda width: -(-width // group_size)
    sizes = {(64, 64): 2, (32, 64): 2, (172, 64): 2, (64, 172): 1}  # (out, in) -> linears per block
    weights = sum(n * rows * columns for (rows, columns), n in sizes.items())
    bits = sum(n * rows * (4 * columns + groups(columns) * (16 + 4)) for (rows, columns), n in sizes.items())
    assert result["bits"]["effective_w_bits"] == pytest.approx(bits / weights)
