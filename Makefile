PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.stamp
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
BENCH_BIN := .venv-bench/bin
BENCH_STAMP := .venv-bench/.stamp
BENCH_INSTALL := $(BENCH_BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help .venv demo test models lint format bench bench-gpu coverage layers clean

help:  ## Lists the targets.
	@grep -hE '^[a-z.-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z.-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

.venv: $(STAMP)  ## Sets up the virtual environment; PYTHON=python3.12 chooses the Python.

# torch goes first: the build that is pinned then satisfies every later requirement, and nothing replaces it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'gimli_compile needs Python 3.11 or newer, and "$(PYTHON)" is not: name one that is, as in "make PYTHON=python3.12".' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable '.[demo,test,lint]'
	@touch $@

demo: $(STAMP)  ## Learns the learning rates of an optimizer, and draws what was learned.
	$(BIN)/python examples/learn_learning_rates.py

# One torch thread a worker: the workers already fill the cores.
test: $(STAMP)  ## Runs the tests; PYTEST_ARGS='-k name' runs some, WORKERS=8 uses more cores.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -q $(PYTEST_ARGS)

lint: $(STAMP)  ## Checks style, format and types.
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m basedpyright --pythonpath $(BIN)/python

format: $(STAMP)  ## Formats the code and mends what can be mended.
	$(BIN)/python -m ruff check --fix
	$(BIN)/python -m ruff format

bench: $(BENCH_STAMP)  ## Measures this project and its peers into docs/performance.md; BENCH_ARGS='--quick' in small.
	$(BENCH_BIN)/python -m benchmarks --output docs/performance.md $(BENCH_ARGS)

bench-gpu: $(BENCH_STAMP)  ## The same with torch's contenders on a GPU.
	$(BENCH_BIN)/python -m benchmarks --device cuda --output docs/performance.md $(BENCH_ARGS)

# The peers live apart: nothing that they require reaches the environment of development.
$(BENCH_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	$(BENCH_INSTALL) torch
	$(BENCH_INSTALL) --editable '.[bench]'
	@touch $@

coverage: $(STAMP)  ## Measures the optimizers of torch.optim and pytorch_optimizer into docs/coverage.md.
	OMP_NUM_THREADS=1 $(BIN)/python -m gimli_compile coverage torch.optim pytorch_optimizer \
	  --recipes tests/support/recipes.py --jobs $(WORKERS) --format markdown --output docs/coverage.md

models: $(STAMP)  ## Trains models of transformers, peft and torch_geometric against the live loop.
	$(PIP_INSTALL) --editable '.[models]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -q tests/models

layers: $(STAMP)  ## Measures the layers and losses of torch.nn into docs/layers.md.
	PYTHONPATH=tests/support OMP_NUM_THREADS=1 $(BIN)/python docs/write_layers.py

clean:  ## Removes caches and outputs; the virtual environment stays.
	rm -rf build dist htmlcov .coverage .coverage.* .pytest_cache .ruff_cache torch_compile_debug benchmarks/output examples/output
	find . -name '.venv*' -prune -o -type d -name __pycache__ -exec rm -rf {} +
