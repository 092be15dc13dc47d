"""The wheel carries its configuration, sweeps, texts and model, and works outside a checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_everything_that_is_read_at_run_time(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "src"
    expected = {
        p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    expected |= {
        f"ptqbench/shipped/{p.relative_to(ROOT).as_posix()}"
        for d in ("conf", "sweeps")
        for p in (ROOT / d).rglob("*.yaml")
    }
    expected |= {f"ptqbench/shipped/analysis/reported/{p.name}" for p in (ROOT / "analysis" / "reported").iterdir()}
    expected.add("ptqbench/shipped/analysis/claims.yaml")
    assert expected <= names, sorted(expected - names)
    assert wheel.stat().st_size < 10e6


@pytest.mark.slow
def test_installed_wheel_runs_a_cell_from_an_empty_folder(wheel, tmp_path):
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    # isolated from the checkout: the installed copy comes first on the path, and says where its configuration is
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); from ptqbench.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["method=rtn", "bitwidth=w8", "+evaluation.texts.tiny.portion=[0,0.02]", "evaluation.tasks=[]"]
    words += ["calibration.n_samples=2", "calibration.seq_len=16"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tiny/perplexity" in done.stdout
    where = subprocess.run([sys.executable, "-c", code, "doctor"], cwd=tmp_path, capture_output=True, text=True)
    assert str(target / "ptqbench" / "shipped" / "conf") in where.stdout
    claims = subprocess.run([sys.executable, "-c", code, "claims"], cwd=tmp_path, capture_output=True, text=True)
    assert "not run" in claims.stdout, claims.stderr
