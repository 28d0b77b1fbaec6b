# On the CPU: make test, make bench.
# On a CUDA machine with PyTorch, Triton, pytest and hypothesis: make gpu OUT=DIR.

# The interpreter that makes the virtual environment, and where it goes.
PYTHON ?= python3
VENV ?= .venv
# What pip installs first. The newest PyTorch would bring gigabytes of CUDA libraries.
TORCH ?= torch==2.13.0
# Number of test processes on the CPU, and the limit for one test in seconds.
JOBS ?= 2
TEST_TIMEOUT ?= 300
# The interpreter of a CUDA machine, used as it is: nothing is installed.
PYTHON_GPU ?= python3

BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
# Each TORCH has a stamp of its own, so that a change of it installs the other release.
TORCH_KEY := $(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)
TORCH_STAMP := $(VENV)/.torch-$(TORCH_KEY)
PACKAGE_STAMP := $(VENV)/.package
CSRC := $(shell find csrc -type f -not -name '*.pyc')
PYTEST := OMP_NUM_THREADS=1 PYTEST_TIMEOUT=$(TEST_TIMEOUT) $(BIN)/python -m pytest -n $(JOBS)

.DEFAULT_GOAL := help
.PHONY: help venv test test-fast ptx coverage lint bench bench-quick gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "  variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH='$(TORCH)' JOBS=$(JOBS) PYTHON_GPU=$(PYTHON_GPU)"

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

test: lint ## lint, then the whole test suite on the CPU (Triton kernels under its interpreter)
	@$(PYTEST)

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

bench: $(PACKAGE_STAMP) ## the full benchmark of this machine, into benchmarks/results/
	@$(BIN)/python -m benchmarks

bench-quick: $(PACKAGE_STAMP) ## a short benchmark; its results are not kept
	@$(BIN)/python -m benchmarks --quick

# INT, not TERM: pytest then still writes the XML of what it has run. KILL follows 5 s later.
# The benchmark runs even if tests fail; the exit status covers both. Tests spend their time in
# the compiler, so they run in parallel where pytest-xdist is installed. Each process has one
# thread and takes one test at a time: in larger shares one process would have all slow tests.
gpu: ## native build, all tests and the full benchmark on a CUDA machine, under 10 minutes: make gpu OUT=DIR
	@test -n "$(OUT)" || { echo "make gpu: name the results directory: make gpu OUT=DIR" >&2; exit 2; }
	@command -v "$(PYTHON_GPU)" >/dev/null || \
		{ echo "make gpu: no '$(PYTHON_GPU)' here: set PYTHON_GPU" >&2; exit 2; }
	@"$(PYTHON_GPU)" -c 'import hypothesis, pytest, sys, torch, triton; \
		torch.cuda.is_available() or sys.exit("PyTorch %s sees no CUDA device" % torch.__version__); \
		print("%s, PyTorch %s, Triton %s" \
			% (torch.cuda.get_device_name(), torch.__version__, triton.__version__))' || \
		{ echo "make gpu: needs CUDA, PyTorch, Triton, pytest and hypothesis in '$(PYTHON_GPU)'" >&2; exit 2; }
	@mkdir -p "$(OUT)"
	@export PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}"; failed=""; \
	export TORCH_CUDA_ARCH_LIST=$$("$(PYTHON_GPU)" -c \
		'import torch; print("%d.%d" % torch.cuda.get_device_capability())'); \
	if command -v nvcc >/dev/null; then export REPMTL_REQUIRE_NATIVE=1 REPMTL_REQUIRE_CUDA=1; fi; \
	timeout -s INT -k 5 60 "$(PYTHON_GPU)" setup.py -q build_ext --inplace \
		|| failed="$$failed build($$?)"; \
	jobs=$$("$(PYTHON_GPU)" -c 'import os, xdist; \
		print("-n", min(16, os.cpu_count()), "--maxschedchunk", 1)' 2>/dev/null); \
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 \
		timeout -s INT -k 15 210 "$(PYTHON_GPU)" -m pytest tests -m "not slow_cpu" $$jobs \
		--junitxml="$(OUT)/tests.xml" --cells "$(OUT)" || failed="$$failed tests($$?)"; \
	timeout -s INT -k 5 260 "$(PYTHON_GPU)" -m benchmarks --out "$(OUT)" \
		|| failed="$$failed benchmark($$?)"; \
	if [ -n "$$failed" ]; then \
		echo "make gpu: failed, with exit status (124: ran out of time):$$failed" >&2; exit 1; \
	fi; \
	echo "make gpu: tests and benchmark done; results in $(OUT)"

clean: ## remove build products and caches; the virtual environment stays
	@rm -rf build/lib* build/temp* build/bdist* dist repmtl_kernels.egg-info repmtl_kernels/*.so repmtl_kernels/_native_*.txt .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage $(PACKAGE_STAMP)
	@find . -path "./$(VENV)" -prune -o -name __pycache__ -prune -exec rm -rf {} +
