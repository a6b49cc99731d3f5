# Handcar's commands. Needs make and Python 3.11, 3.12 or 3.13; everything else goes into $(VENV).
#
#   make PYTHON=python3.12        the interpreter for a new environment (default: the first that fits)
#   make VENV=/path/to/env        another environment; one that exists is used as it is, with its torch
#   make TORCH='torch==2.14.1'    another torch; any pip arguments work
#   make test ARGS='-k rounds'    more arguments for the command behind a target

VENV ?= .venv
TORCH ?= -r .lock/torch.txt
PYTHON ?=
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
STAMP := $(VENV)/.handcar-setup
FITS := import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
HAS_TORCH := import importlib.metadata as m; raise SystemExit([int(n) for n in m.version("torch").split(".")[:2]] < [2, 10])

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check lint bench fuzz chaos-memory chaos-averaging chaos-trust lock clean
.DELETE_ON_ERROR:

help: ## list the targets
	@echo "Handcar: train one large model on many home machines."
	@sed -n 's/^\([a-z%-]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r t d; do printf '%-16s %s\n' "$$t" "$$d"; done

setup: $(STAMP) ## make the environment and install Handcar into it (the others do it by themselves)

demo: $(STAMP) ## train a small model with a whole swarm on this machine
	@$(BIN)/coordinator demo $(ARGS)

# Two workers; tests/conftest.py says what each of them gets. ARGS='-n 0' does without.
test: $(STAMP) ## run the test suite, but for what takes a minute by itself
	@$(BIN)/python -m pytest -q -rfEs -n 2 --no-loadscope-reorder --durations=15 -m "not long" $(ARGS)

test-all: $(STAMP) ## run all of it, as CI does
	@$(BIN)/python -m pytest -q -rfEs -n 2 --no-loadscope-reorder --durations=15 $(ARGS)

check: lint ## lint, types, layer contracts and the fast tests
	@$(BIN)/python -m pytest -q -rfEs -m "not slow and not e2e" $(ARGS)

lint: $(STAMP) ## lint, types and layer contracts alone
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "handcar: not formatted; run: $(BIN)/ruff format ." >&2; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo >$(VENV)/.layers.txt || { cat $(VENV)/.layers.txt; exit 1; }

bench: $(STAMP) ## run every benchmark (ARGS='--quick --json FILE')
	@$(BIN)/python -m tests.benchmarks $(ARGS)

bench-%: $(STAMP) ## run one benchmark, for example make bench-pipeline
	@$(BIN)/python -m tests.benchmarks.$* $(ARGS)

fuzz: $(STAMP) ## change honest bytes at random, and see what decoders make of them (ARGS='--seconds 60')
	@$(BIN)/python -m tests.fuzz $(ARGS)

chaos-memory: $(STAMP) ## kill -9 training with its state on disk, 100 times
	@$(BIN)/python -m tests.e2e.memory_chaos $(ARGS)

chaos-averaging: $(STAMP) ## kill -9 members of a stage while they average, 100 times
	@$(BIN)/python -m tests.e2e.averaging_chaos $(ARGS)

chaos-trust: $(STAMP) ## kill -9 the coordinator while it settles credits, 100 times
	@$(BIN)/python -m tests.e2e.trust_chaos $(ARGS)

lock: $(STAMP) ## resolve the locked dependency set again
	@$(PIP) install 'uv>=0.9'
	@sh .lock/resolve $(BIN)/uv
	@$(MAKE) --no-print-directory setup

clean: ## remove the environment and all caches
	@rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A torch that is in the environment and new enough stays, whatever its build; see docs/decisions/0001.
$(STAMP): pyproject.toml .lock/constraints.txt .lock/torch.txt | $(BIN)/python
ifeq ($(origin TORCH),file)
	@$(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null || { \
	  echo "handcar: installing torch (once; on Linux the CUDA build of several GB, unless pip is given CPU wheels)"; \
	  $(PIP) install $(TORCH); }
else
	@$(PIP) install $(TORCH)
endif
	@echo "handcar: installing the locked dependencies"
	@$(PIP) install -c .lock/constraints.txt -e '.[dev]'
	@touch $@

$(BIN)/python:
	@for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	  if $$candidate -c '$(FITS)' 2>/dev/null; then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "handcar: Python 3.11, 3.12 or 3.13 is needed and $(or $(PYTHON),python3) is not one of them; say which to use: make PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	echo "handcar: making $(VENV) with $$($$found --version)"; \
	$$found -m venv $(VENV) || { rm -rf $(VENV); echo "handcar: $$found cannot make an environment (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
