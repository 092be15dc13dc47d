# make demo | real | notebooks | test | test-fast | docs | torture | lint | format | clean. Each sets up .venv itself, once; CONSTRAINTS= installs the newest versions instead.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p >/dev/null 2>&1 && \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
DEMO ?= demo
REAL ?= real
DOCS ?= docs/_build
PYTEST ?=
RUNS ?=
JUPYTER ?=
# Laws, structure, identity, and one cell of every method; fused_columns interprets a kernel, which is slow.
FAST := tests/numerics tests/cell tests/test_structure.py tests/test_every_method.py --ignore=tests/numerics/test_fused_columns.py
MINUTES ?= 60
SEED ?= 0
WORKERS ?= 2
ONLY ?=
NUMBER ?=
FIRST ?=
PROVE ?=

.PHONY: demo real notebooks test test-fast docs torture lint format clean help

help:
	@echo "make demo     quantize the embedded model with every method, show the comparison, write a report"
	@echo "make real     the same on SmolLM2-135M, a real language model from the package index (30 minutes on two cores)"
	@echo "make notebooks  open the notebooks on finished cells (RUNS=FOLDER; else runs, or those of the demo; JUPYTER=--no-browser)"
	@echo "make test     run the tests (PYTEST='-k gptq' passes options)"
	@echo "make test-fast  laws, structure, identity, one cell of every method"
	@echo "make docs     build the documentation site into docs/_build (DOCS=FOLDER), notebooks executed on the demo's runs (DEMO=FOLDER)"
	@echo "make torture  kills, full disks, races, wrong requests (MINUTES=60 SEED=0 WORKERS=2 ONLY=kills,disk NUMBER=17 PROVE=1)"
	@echo "make lint     ruff and mypy"
	@echo "make format   ruff format"
	@echo "make clean    remove .venv, caches and the demo's results"

demo: $(VENV)/.run
	$(BIN)/python -m ptqbench sweep demo launcher=local --runs-dir $(DEMO)/runs
	@$(BIN)/python -m ptqbench table demo --runs-dir $(DEMO)/runs --picture $(DEMO)/comparison.png
	@$(BIN)/python -m ptqbench report demo --runs-dir $(DEMO)/runs --output $(DEMO)/report.html

real: $(VENV)/.real
	@$(BIN)/python scripts/real_model.py $(REAL)
	$(BIN)/python -m ptqbench sweep smollm2 launcher=local --runs-dir $(REAL)/runs $$(cat $(REAL)/words)
	@$(BIN)/python -m ptqbench table smollm2 --runs-dir $(REAL)/runs --picture $(REAL)/comparison.png $$(cat $(REAL)/words)
	@$(BIN)/python -m ptqbench report smollm2 --runs-dir $(REAL)/runs --output $(REAL)/report.html $$(cat $(REAL)/words)

notebooks: $(VENV)/.notebooks
	$(if $(RUNS),PTQBENCH_RUNS=$(abspath $(RUNS))) $(BIN)/python -m jupyterlab $(JUPYTER) analysis

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST)

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest $(FAST) $(PYTEST)

docs: $(VENV)/.docs
	PTQBENCH_DOCS_RUNS=$(abspath $(DEMO)/runs) $(BIN)/python -m sphinx -q -W --keep-going -b html docs $(DOCS)
	@echo "documentation: $(DOCS)/index.html"

torture: $(VENV)/.dev
	PYTHONPATH=tests $(BIN)/python -m torture --minutes $(MINUTES) --seed $(SEED) --workers $(WORKERS) \
		$(if $(ONLY),--only $(ONLY)) $(if $(NUMBER),--number $(NUMBER)) $(if $(FIRST),--first $(FIRST)) $(if $(PROVE),--prove)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO) $(DOCS) docs/notebooks build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "ptqbench needs Python 3.11, 3.12 or 3.13 on PATH; or say make PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch first: where it comes from differs between machines, and nothing else may choose its version
$(VENV)/.torch: $(BIN)/python constraints.txt
	@echo "installing torch into $(VENV) ..."
	@$(PIP) torch
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	@echo "installing ptqbench into $(VENV) (3 to 4 minutes the first time) ..."
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "installing the development tools into $(VENV) ..."
	@$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.real: $(VENV)/.run
	@$(PIP) -e '.[real]'
	@touch $@

$(VENV)/.docs: $(VENV)/.run
	@echo "installing Sphinx into $(VENV) ..."
	@$(PIP) -e '.[docs]'
	@touch $@

$(VENV)/.notebooks: $(VENV)/.run
	@echo "installing JupyterLab into $(VENV) ..."
	@$(PIP) -e '.[notebooks]'
	@touch $@
