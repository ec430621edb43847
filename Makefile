# make demo   the whole tour on embedded data          make test    the default test suite
# make check  lint, types, tests, doctests, examples   make test-slow, make bench   longer runs
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
CODE := ppl_models inference tests examples
JOBS ?= 2
# Processes share the cores, so each computes on one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

.PHONY: demo test test-slow check lint types doctests bench lock clean

demo: .venv/ready
	$(BIN)/ppl demo --out runs/demo --force

test: .venv/ready
	$(PYTEST) -m "not slow and not gpu" tests

test-slow: .venv/ready
	$(PYTEST) -m "slow and not gpu" tests

# The examples are among the tests.
check: lint types test doctests

bench: .venv/ready
	$(BIN)/python -m tests.benchmarks.steps
	$(BIN)/python -m tests.benchmarks.anatomy
	$(BIN)/python -m tests.benchmarks.diffusion
	$(BIN)/python -m tests.benchmarks.discrete
	$(BIN)/python -m tests.benchmarks.evidence

lint: .venv/ready
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: .venv/ready
	$(BIN)/mypy

doctests: .venv/ready
	$(PYTEST) --doctest-modules --doctest-glob=README.md ppl_models inference README.md

# Versions are pinned in requirements.lock; the project itself is installed in place, without touching them.
.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else f"expected Python 3.11 or later, got {v}: set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

lock:
	rm -rf .lockenv && $(PYTHON) -m venv .lockenv
	.lockenv/bin/python -m pip install --quiet torch==2.13.0 "setuptools>=77" ".[dev]"
	.lockenv/bin/python -m pip freeze --all --exclude ppl-models --exclude pip | sed 's/^torch==\([0-9.]*\)+.*/torch==\1/' > requirements.lock
	rm -rf .lockenv

clean:
	rm -rf .venv build dist *.egg-info runs
