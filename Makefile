# `make run` and `make test` each install everything they need. They require Python 3.11+ and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NIGHTS ?= 50
INSTALL := $(BIN)/python .ci/install.py
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
# The tests start hundreds of processes. With this variable, each of them would compile our modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test test-all test-deep soak bench lint clean

run: $(VENV)/installed
	@$(BIN)/gptflow run quickstart

test: lint
	$(PYTEST) -m "not slow and not deep"

# All tests of `make test`, and tests with real kills, servers and browsers.
test-all: $(VENV)/installed-test-all lint
	$(PYTEST) -m "not deep" --durations 12

# The tests that are too long or too heavy for every change.
test-deep: $(VENV)/installed-test-deep
	$(PYTEST) -m deep --durations 0

# Many nights of retraining, with kills at random moments. A night takes about half a minute.
soak: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.soak --nights $(NIGHTS) --seed 1 --json build/soak.json

# Training steps, generation and tokenising, compared with other implementations. Takes about ten minutes.
bench: $(VENV)/installed-bench
	$(BIN)/python -m bench --json build/bench/bench.json

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gptflow needs Python 3.11 or newer; " \
		"name one with: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV), once: a minute or two"
	$(INSTALL) --editable .
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true
	@touch $@

# Each tier of tests installs all its packages in one call, including those of the tiers below it.
$(VENV)/installed-dev $(VENV)/installed-test-all $(VENV)/installed-test-deep: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable ".[$(@:$(VENV)/installed-%=%)]"
	@touch $(VENV)/installed $(VENV)/installed-dev $@

# litgpt requires an older huggingface-hub than transformers can use. The benchmark works without the older one.
$(VENV)/installed-bench: $(VENV)/installed
	$(INSTALL) --editable ".[bench]"
	$(INSTALL) --no-deps litgpt
	@touch $@
