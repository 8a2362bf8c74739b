# `make` lists the targets. `make test` and `make demo` set everything up first, in .venv; running them twice is safe.

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.engram-lm-is-set-up
PREPARED := $(VENV)/.engram-lm-demo-is-prepared
PIP    := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq
TORCH  := torch==2.13.0

# The first Python that is 3.11 or newer and can make environments; or name one: make setup PYTHON=/path/to/python3
PYTHON ?= $(shell for python in python3 python3.12 python3.13 python3.11 python3.14; do \
    $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
    && { echo $$python; break; }; done)

.DEFAULT_GOAL := help
.PHONY: help setup test test-all lint types dist bench-core bench-tables bench-index proof figures demo demo-terminal

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## environment in .venv: torch 2.13.0, then this project with [hf,serve,dev], all versions pinned; kernels

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "setup: found no Python 3.11 or newer with the venv module." \
	    "Install one (Debian: apt install python3-venv) or name it: make setup PYTHON=..." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 \
	    || { echo "setup 1/4: new environment in $(VENV) with $(PYTHON)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "setup 2/4: $(TORCH) (the default build for Linux is some GB; the first time takes minutes)"
	@$(PIP) install $(TORCH) -c constraints.txt
	@echo "setup 3/4: engram-lm with its extras hf, serve and dev"
	@$(PIP) install -e '.[hf,serve,dev]' -c constraints.txt
	@echo "setup 4/4: kernels, compiled for this machine"
	@$(BIN)/engram-lm compile
	@touch $@
	@echo "setup: done"

test: setup ## the fast set, about four minutes on two cores
	$(BIN)/python -m pytest -q -n 2

test-all: setup ## everything but benchmarks: the fast set, the slow one, and what needs a package registry
	$(BIN)/python -m pytest -q -n 2 -m "not bench"

lint: setup ## ruff and import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: setup ## pyrefly; not part of lint, as attributes of torch modules are beyond it
	$(BIN)/pyrefly check

dist: setup ## sdist and wheel, in dist/
	$(BIN)/python -m hatchling build

bench-core: setup ## time the core on one thread; the last line is JSON
	@test -f benchmarks/core.py || { echo "bench-core: benchmarks/core.py is not there yet" >&2; exit 1; }
	$(BIN)/python benchmarks/core.py

bench-tables: setup ## time tables in host memory, on disk and in training; needs fio; the last line is JSON
	$(BIN)/python benchmarks/tables.py

bench-index: setup ## the index on real text beside infini-gram; ENGRAM_INDEX_TEXT names the text; the last line is JSON
	$(BIN)/python benchmarks/index.py

proof: setup ## does a fact live in memory? eleven arms, two seeds, about an hour of one core; goes on where it was stopped
	OMP_NUM_THREADS=1 $(BIN)/python experiments/where_a_fact_lives/run.py --out runs/proof
	$(BIN)/python experiments/where_a_fact_lives/figures.py --from runs/proof/results

figures: setup ## tables and plots of the experiments, and README's section on what memory does, from result files
	$(BIN)/python experiments/figures.py

demo: $(PREPARED) ## a page: see what memory does, and change it; Ctrl-C stops it
	$(BIN)/engram-lm serve

$(PREPARED): $(STAMP)
	@echo "demo: the first time SmolLM2 is fetched (98 MB)"
	@$(BIN)/engram-lm serve --prepare
	@touch $@

demo-terminal: setup ## the same memory without a browser: text that reddens
	$(BIN)/engram-lm demo
