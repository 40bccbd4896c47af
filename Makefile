# Everything a developer runs.  `make demo` and `make test` need Python, a C compiler and make, nothing else: they make
# .venv on first use.  PYTHON chooses the interpreter (3.10 to 3.13), CC the compiler, JOBS how many compile at once,
# TEST_JOBS how many processes run the Python tests (about 2 GiB each).

PYTHON ?= python3
CC     ?= cc
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)
TEST_JOBS ?= 2

export OMP_NUM_THREADS ?= 2

PY_SOURCES := setup.py llmprune tests $(wildcard demo benchmarks docs/*.py)
C_FILES    := $(wildcard csrc/core/*.[ch] csrc/kernels/cpu/*.[ch] csrc/kernels/cuda/*.[ch] csrc/binding/*.[ch] \
                         csrc/binding/cuda/*.c tests/core/*.[ch] tests/kernels/*.[ch] tests/fuzz/*.[ch])
CUDA_FILES := $(wildcard csrc/kernels/cuda/*.cu csrc/kernels/cuda/*.cuh tests/cuda_host/*.cpp tests/cuda_host/*.h)

.PHONY: help demo test lint types fmt portable ctest asan tsan valgrind fuzz arm windows pytest bench architectures docs cuda cuda-test cuda-bench soak release clean

help:
	@echo "make demo      prune the model in demo/ and write the result to out/demo"
	@echo "make test      everything CI runs: lint, types, ctest, asan, pytest"
	@echo "make lint      ruff and clang-format, changing nothing;  make fmt applies them"
	@echo "make types     mypy, and stubtest: does _core.pyi describe the extension?"
	@echo "make ctest     the C tests; asan, tsan, valgrind: the same under a checker"
	@echo "make fuzz      libFuzzer on the targets of tests/fuzz, FUZZ_SECONDS=600 each; clang's, and none of make test"
	@echo "make portable  is csrc/core ISO C11 and nothing else?"
	@echo "make arm       the C tests on an emulated aarch64;  make windows: on Windows, under wine"
	@echo "make pytest    the Python tests (ARGS=... goes to pytest)"
	@echo "make soak      200 rounds of pruning, saving and loading: does memory stay flat?"
	@echo "make bench     every benchmark; results in benchmarks/results"
	@echo "make architectures  try every architecture; the table is docs/architectures.md (JOBS at once)"
	@echo "make docs      the documentation as pages, every warning an error; the result is build/site/index.html"
	@echo "make cuda      build the CUDA kernels for every target, without a GPU; skipped where there is no nvcc"
	@echo "make cuda-test on a machine with a GPU: build with its own Python and toolkit, test, and run the sanitizers"
	@echo "make cuda-bench there: what it costs, beside its floors"
	@echo "make release   build what would be uploaded, check it, and say what it is"
	@echo "make clean     remove what was built, but not .venv"

# --- environment and extension --------------------------------------------------------------------------------------

INSTALLED := $(VENV)/.installed
EXTENSION := $(VENV)/.extension

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing llmprune and what its tests need into $(VENV)"
	LLMPRUNE_CUDA=0 LLMPRUNE_WERROR=1 $(BIN)/pip install --quiet -c constraints.txt torch -e ".[test]"
	@touch $@

# Rebuilt with warnings as errors whenever a C file or setup.py changed after the editable install.
$(EXTENSION): $(INSTALLED) setup.py $(C_FILES)
	LLMPRUNE_CUDA=0 LLMPRUNE_WERROR=1 $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# --- the two commands of the README ---------------------------------------------------------------------------------

demo: $(EXTENSION)
	$(BIN)/llmprune prune demo/model --ratio 0.2 \
	    --calibration demo/calibration.txt --eval demo/eval.txt \
	    --output out/demo --overwrite --generate "Once there was"

test: lint types portable ctest asan cuda pytest

# --- checks ---------------------------------------------------------------------------------------------------------

lint: $(INSTALLED)
	$(BIN)/ruff check $(PY_SOURCES)
	$(BIN)/ruff format --check $(PY_SOURCES)
	$(BIN)/clang-format --dry-run --Werror $(C_FILES) $(CUDA_FILES)

fmt: $(INSTALLED)
	$(BIN)/ruff check --fix $(PY_SOURCES)
	$(BIN)/ruff format $(PY_SOURCES)
	$(BIN)/clang-format -i $(C_FILES) $(CUDA_FILES)

types: $(EXTENSION)
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest --mypy-config-file pyproject.toml llmprune._core

# Files are shared out whole, so that what a file sets up is set up once; a thread each, or the processes would spin.
pytest: $(EXTENSION)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile $(ARGS)

soak: $(EXTENSION)
	LLMPRUNE_SOAK=1 $(BIN)/python -m pytest tests/python/test_soak.py

bench: $(EXTENSION)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[bench]"
	set -e; for file in $(filter-out benchmarks/_% benchmarks/architectures.py benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do echo "$$file"; $(BIN)/python "$$file"; done

architectures: $(EXTENSION)
	$(BIN)/python benchmarks/architectures.py --jobs $(JOBS) $(ARGS)

docs: $(EXTENSION)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# --- CUDA -----------------------------------------------------------------------------------------------------------
# `cuda` needs no GPU: it compiles for every target and asks the module what it finds.  cuBLAS' headers and library come from
# PyPI.  `cuda-test` is for a machine with a GPU: PYTHON is the one that holds torch there, and nothing is installed.

CUDA_PACKAGES ?= nvidia-cublas cuda-pathfinder

cuda: $(EXTENSION)
	@if ! $(or $(NVCC),nvcc) --version 2>/dev/null | grep -q "release 13"; then \
	    echo "cuda: skipped, there is no nvcc of CUDA 13 on this machine"; \
	else set -e; \
	    $(BIN)/pip install --quiet -c constraints.txt $(CUDA_PACKAGES); \
	    LLMPRUNE_CUDA=1 LLMPRUNE_WERROR=1 $(BIN)/python setup.py --quiet build_ext --inplace; \
	    $(BIN)/python -m pytest -q tests/cuda/test_loading.py; \
	fi

GPU_ARCHS ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | tr -d . | paste -sd,)
SANITIZED := -q -p no:cacheprovider tests/cuda/test_device_kernels.py -k "not large"

cuda-test:
	LLMPRUNE_CUDA=1 LLMPRUNE_WERROR=1 LLMPRUNE_CUDA_ARCHS="$(GPU_ARCHS)" $(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) -m pytest tests/cuda $(ARGS)
	compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) -m pytest $(SANITIZED)
	compute-sanitizer --tool racecheck --error-exitcode 1 $(PYTHON) -m pytest $(SANITIZED)
	@echo "now measure: make cuda-bench PYTHON=$(PYTHON)"

cuda-bench:
	$(PYTHON) benchmarks/gpu.py $(ARGS)

# Refuses a changed tree, and a version that the changelog does not know. Uploads nothing.
VERSION = $(shell $(BIN)/python -c "import llmprune; print(llmprune.__version__)")
release: $(INSTALLED)
	@test -z "$$(git status --porcelain)" || { echo "release: commit or remove what is changed first (git status)" >&2; exit 1; }
	@grep -q "^## \[$(VERSION)\]" CHANGELOG.md || \
	    { echo "release: CHANGELOG.md has no section [$(VERSION)]: name the one of what is unreleased" >&2; exit 1; }
	$(BIN)/pip install --quiet -c constraints.txt build twine
	rm -rf dist
	LLMPRUNE_CUDA=0 $(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	@echo "nothing was uploaded; twine upload would take:"; ls -l dist

# --- C tests: no Python involved ------------------------------------------------------------------------------------
# Each tests/{core,kernels}/test_*.c is a program that exits 0 when it passes; other .c files there are shared by all.

include tests/c.mk

clean:
	rm -rf build dist out *.egg-info llmprune/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f $(EXTENSION)
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
