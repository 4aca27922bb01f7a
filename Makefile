# `make train` and `make test` do all the set-up themselves: a virtual environment in .venv with the versions of
# requirements/lock-*.txt, and the build. NEWEST=1: the newest of everything instead, in an environment of its own.
PYTHON ?= python3
ifneq ($(filter-out 1,$(NEWEST)),)
$(error NEWEST must be 1 or not be given, got $(NEWEST))
endif
VENV ?= $(if $(NEWEST),.venv-newest,.venv)
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
SOURCES := CMakeLists.txt $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*/*.h csrc/cuda/* csrc/cuda/*/* csrc/simt/* csrc/cutlass/*)
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo 1)

.PHONY: train test compat lock sanitize sanitizers cuda-all verify bench bench-compare build lint style types format docs hub clean setup newest

setup: $(STAMP)

$(STAMP): setup.py pyproject.toml tools/setup_env.sh $(wildcard requirements/lock* requirements/cuda.txt) $(if $(NEWEST),newest)
	PYTHON="$(PYTHON)" VENV="$(VENV)" GPU="$(GPU)" VERSIONS=$(if $(NEWEST),newest,locked) tools/setup_env.sh
	touch $@

# Resolves all versions anew, for every Python, into requirements/; ARGS="--upgrade-package NAME" moves only that one.
lock:
	$(PYTHON) tools/lock.py $(ARGS)

# The lowest and the newest versions that pyproject.toml promises, each from a source distribution; minutes.
compat:
	GPU="$(GPU)" $(PYTHON) tools/compat.py $(ARGS)

# Training builds CUDA only where a GPU is visible; tests build it wherever nvcc is found, for one architecture.
build: $(STAMP) $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" MOEKERNELS_CUDA=$${MOEKERNELS_CUDA:-auto} $(BIN)/python setup.py -q build_ext --inplace

train: export MOEKERNELS_CUDA := $(if $(GPU),1,0)
train: build
	$(BIN)/python -m moekernels train $(ARGS)

lint test: export MOEKERNELS_CUDA_ARCHS := 90a-real
lint test: export MOEKERNELS_EMULATED := 1
test: sanitizers
	$(BIN)/python -m pytest -n auto --dist loadgroup $(ARGS)

# The CUDA kernels under g++'s sanitizers, and bugs planted into them; needs nvcc's headers. `make test` runs it too.
sanitize: export MOEKERNELS_CUDA_ARCHS := 90a-real
sanitize: export MOEKERNELS_EMULATED := 1
sanitize: sanitizers
	$(BIN)/python -m pytest python_tests/cuda/test_sanitize.py $(ARGS)

sanitizers: build
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/cmake --target sanitizers

# Every architecture that a release holds; needs nvcc.
cuda-all: export MOEKERNELS_CUDA := 1
cuda-all: build

verify: build
	$(BIN)/python -m moekernels verify --all $(ARGS)

bench: build
	$(BIN)/python -m moekernels bench $(ARGS)

# What fell by more than 10 % against the ratios stored for this kind of machine; ARGS=--store keeps these. RUNS=3: the median
# of three runs, and what they do not agree on is not judged.
RUNS ?= 1
bench-compare: build
	rm -f build/bench-*.json
	for run in $$(seq $(RUNS)); do \
	  $(BIN)/python -m moekernels bench --benchmark-json=build/bench-$$run.json || exit 1; done
	$(BIN)/python bench/compare.py build/bench-*.json $(ARGS)

# C++ and CUDA, by the same versions of the tools everywhere: those of requirements/.
CPP = $$(find csrc bench python_tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

lint: style types

types: $(STAMP)
	$(BIN)/mypy

style: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(STAMP)
	$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/clang-format -i $(CPP)

# build/docs, in an environment of its own: nothing of the package is imported.
docs: .venv-docs/.ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict $(ARGS)

.venv-docs/.ready: requirements/docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip --disable-pip-version-check --quiet install -r requirements/docs.txt
	touch $@

# build/hub: a folder for the kernels hub, with a library for this machine.
hub: build
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/hub.py $(ARGS)

clean:
	rm -rf build dist *.egg-info moekernels/*.so .venv-newest .venv-docs
