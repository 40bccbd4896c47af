# Everything a developer runs.  `make demo` and `make test` need Python, a C compiler and make, nothing else: they make
# .venv on first use.  PYTHON chooses the interpreter (3.10 to 3.13), CC the compiler, JOBS how many compile at once.

PYTHON ?= python3
CC     ?= cc
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)

export OMP_NUM_THREADS ?= 2

PY_SOURCES := setup.py llmprune tests $(wildcard demo benchmarks)
C_FILES    := $(wildcard csrc/core/*.[ch] csrc/kernels/cpu/*.[ch] csrc/binding/*.[ch] tests/core/*.[ch] tests/kernels/*.[ch])

.PHONY: help demo test lint types fmt ctest asan tsan valgrind pytest bench architectures clean

help:
	@echo "make demo      prune the model in demo/ and write the result to out/demo"
	@echo "make test      everything CI runs: lint, types, ctest, asan, pytest"
	@echo "make lint      ruff and clang-format, changing nothing;  make fmt applies them"
	@echo "make types     mypy, and stubtest: does _core.pyi describe the extension?"
	@echo "make ctest     the C tests; asan, tsan, valgrind: the same under a checker"
	@echo "make pytest    the Python tests (ARGS=... goes to pytest)"
	@echo "make bench     every benchmark; results in benchmarks/results"
	@echo "make architectures  try every architecture; the table is docs/architectures.md (JOBS at once)"
	@echo "make clean     remove what was built, but not .venv"

# --- environment and extension --------------------------------------------------------------------------------------

INSTALLED := $(VENV)/.installed
EXTENSION := $(VENV)/.extension

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing llmprune and what its tests need into $(VENV)"
	LLMPRUNE_WERROR=1 $(BIN)/pip install --quiet -c constraints.txt torch -e ".[test]"
	@touch $@

# Rebuilt with warnings as errors whenever a C file or setup.py changed after the editable install.
$(EXTENSION): $(INSTALLED) setup.py $(C_FILES)
	LLMPRUNE_WERROR=1 $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# --- the two commands of the README ---------------------------------------------------------------------------------

demo: $(EXTENSION)
	$(BIN)/llmprune prune demo/model --ratio 0.2 --importance element1 \
	    --calibration demo/calibration.txt --eval demo/eval.txt \
	    --output out/demo --overwrite --generate "Once there was"

test: lint types ctest asan pytest

# --- checks ---------------------------------------------------------------------------------------------------------

lint: $(INSTALLED)
	$(BIN)/ruff check $(PY_SOURCES)
	$(BIN)/ruff format --check $(PY_SOURCES)
	$(BIN)/clang-format --dry-run --Werror $(C_FILES)

fmt: $(INSTALLED)
	$(BIN)/ruff check --fix $(PY_SOURCES)
	$(BIN)/ruff format $(PY_SOURCES)
	$(BIN)/clang-format -i $(C_FILES)

types: $(EXTENSION)
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest llmprune._core

pytest: $(EXTENSION)
	$(BIN)/python -m pytest $(ARGS)

bench: $(EXTENSION)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[bench]"
	set -e; for file in $(filter-out benchmarks/_% benchmarks/architectures.py,$(wildcard benchmarks/*.py)); do echo "$$file"; $(BIN)/python "$$file"; done

architectures: $(EXTENSION)
	$(BIN)/python benchmarks/architectures.py --jobs $(JOBS) $(ARGS)

# --- C tests: no Python involved ------------------------------------------------------------------------------------
# Each tests/{core,kernels}/test_*.c is a program that exits 0 when it passes; other .c files there are shared by all.

include tests/c.mk

clean:
	rm -rf build dist out *.egg-info llmprune/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f $(EXTENSION)
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
