# On the CPU: make test, make bench.
# On a CUDA machine with PyTorch, Triton, pytest and hypothesis: make gpu OUT=DIR.

# The interpreter that makes the virtual environment, and where it goes.
PYTHON ?= python3
VENV ?= .venv
# The documentation has its own: without PyTorch, since it reads the sources and imports nothing.
DOCS_VENV ?= .venv-docs
# So has a release: the tools, and the PyTorch that the library is compiled with.
DIST_VENV ?= .venv-dist
# What pip installs first. The newest PyTorch would bring gigabytes of CUDA libraries.
TORCH ?= torch==2.13.0
DIST_TORCH ?= $(TORCH)
# The tag that the library of `make dist` has to fit. "auto" takes the one that this system allows.
DIST_PLATFORM ?= auto
# Number of test processes on the CPU, and the limit for one test in seconds.
JOBS ?= 2
TEST_TIMEOUT ?= 300
# The interpreter of a CUDA machine, used as it is: nothing is installed.
PYTHON_GPU ?= python3

BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
# Each TORCH has a stamp of its own, so that a change of it installs the other release.
key = $(shell printf '%s' '$(1)' | cksum | cut -d' ' -f1)
TORCH_STAMP := $(VENV)/.torch-$(call key,$(TORCH))
PACKAGE_STAMP := $(VENV)/.package
DOCS_STAMP := $(DOCS_VENV)/.docs
DIST_STAMP := $(DIST_VENV)/.dist-$(call key,$(DIST_TORCH))
CSRC := $(shell find csrc -type f -not -name '*.pyc')
PYTEST := OMP_NUM_THREADS=1 PYTEST_TIMEOUT=$(TEST_TIMEOUT) $(BIN)/python -m pytest -n $(JOBS)

.DEFAULT_GOAL := help
.PHONY: help venv test test-fast ptx coverage lint docs dist bench bench-quick gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "  variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH='$(TORCH)' JOBS=$(JOBS) DIST_PLATFORM=$(DIST_PLATFORM) PYTHON_GPU=$(PYTHON_GPU)"

$(TORCH_STAMP):
	@echo "virtual environment: $(VENV), from $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.torch-* $(PACKAGE_STAMP)
	@echo "installing: $(TORCH)"
	@$(PIP) install $(TORCH)
	@touch $@

# All extras at once: each further install would compile csrc again.
$(PACKAGE_STAMP): $(TORCH_STAMP) pyproject.toml setup.py $(CSRC)
	@echo "installing: repmtl-kernels, editable, with what tests and benchmarks need"
	@$(PIP) install -e ".[test,bench]"
	@touch $@

venv: $(PACKAGE_STAMP) ## the virtual environment, with the package and all that tests and benchmarks need

# Each process takes one file after the other. The files with the longest tests come first; by
# default one process would take all of these at once, and the other would have nothing left.
test: lint ## lint, then the whole test suite on the CPU (Triton kernels under its interpreter)
	@$(PYTEST) --dist loadfile --no-loadscope-reorder

test-fast: $(PACKAGE_STAMP) ## one quick case of each test of the package, in a minute
	@$(PYTEST) --fast --ignore tests/bench

ptx: $(PACKAGE_STAMP) ## all cases of compiled kernels, which the PTX machine runs; `make test` has a choice of them
	@$(PYTEST) tests/ptx --compiled benchmarks/results/compiled

# Not part of `make test`: before Python 3.12, counting lines takes the tests 1.9 times as long.
coverage: $(PACKAGE_STAMP) ## the tests of test-fast, and the share of the lines that they run
	@core=$$($(BIN)/python -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")'); \
	COVERAGE_CORE=$$core $(PYTEST) --fast --ignore tests/bench --cov

# In an installed source archive there is no git: find lists the files.
lint: $(PACKAGE_STAMP) ## ruff, import-linter, mypy and clang-format; changes nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/mypy
	@find csrc tests/emulation tests/ptx -name '*.c' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | \
		xargs $(BIN)/clang-format --dry-run -Werror

# The requirements of an extra alone: the extra itself would bring the package, and that PyTorch.
requirements = sed -n '/^$(1) = \[/,/^\]/s/^ *"\(.*\)",.*/\1/p' pyproject.toml

$(DOCS_STAMP): pyproject.toml
	@echo "virtual environment: $(DOCS_VENV), from $(PYTHON)"
	@$(PYTHON) -m venv $(DOCS_VENV)
	@$(call requirements,docs) | \
		$(DOCS_VENV)/bin/pip --disable-pip-version-check --quiet install -r /dev/stdin
	@touch $@

$(DIST_STAMP): pyproject.toml
	@echo "virtual environment: $(DIST_VENV), from $(PYTHON), with $(DIST_TORCH)"
	@$(PYTHON) -m venv $(DIST_VENV)
	@rm -f $(DIST_VENV)/.dist-*
	@$(call requirements,dist) | \
		$(DIST_VENV)/bin/pip --disable-pip-version-check --quiet install --no-compile $(DIST_TORCH) -r /dev/stdin
	@touch $@

# Not --quiet: --strict would then count no warning.
docs: $(DOCS_STAMP) ## the documentation site, into build/site; a broken link or a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --clean
	@echo "documentation: build/site/index.html"

dist: $(DIST_STAMP) ## sdist and wheels, into dist/; checked, installed and tested without the source tree
	@$(DIST_VENV)/bin/python -m release --torch "$(TORCH)" --platform "$(DIST_PLATFORM)"

bench: $(PACKAGE_STAMP) ## the full benchmark of this machine, into benchmarks/results/
	@$(BIN)/python -m benchmarks

bench-quick: $(PACKAGE_STAMP) ## a short benchmark; its results are not kept
	@$(BIN)/python -m benchmarks --quick

gpu: ## build, tests, benchmark and tuning on a CUDA machine, in nine minutes: make gpu OUT=DIR
	@PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" "$(PYTHON_GPU)" -m benchmarks.gpu_run --out "$(OUT)"

clean: ## remove build products and caches; the virtual environment stays
	@rm -rf build/lib* build/temp* build/bdist* dist repmtl_kernels.egg-info repmtl_kernels/*.so repmtl_kernels/_native_*.txt .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage $(PACKAGE_STAMP) build/site
	@find . -path "./$(VENV)" -prune -o -path "./$(DOCS_VENV)" -prune -o -path "./$(DIST_VENV)" -prune -o -name __pycache__ -prune -exec rm -rf {} +
