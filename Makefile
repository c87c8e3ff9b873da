# `make demo` and `make test` each do everything from a fresh clone, with Python (3.10 or later), a C++ compiler, make.
# PYTHON names the interpreter, ARGS goes to `pyeff demo`, `pyeff bench` and the check on a GPU, PYTEST_ARGS to pytest.

PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?=
JOBS ?= auto

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
CMAKE := $(BIN)/cmake
# The index of CPU builds where it can be reached; elsewhere whatever pip is configured to use.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
CROSS ?= aarch64-linux-gnu-g++

NATIVE := CMakeLists.txt $(wildcard cmake/*) \
    $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CPP := $(shell find csrc tests/native -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# Some kernels place memory so randomly that ThreadSanitizer cannot map its shadow; without randomness it can.
FIXED := $(shell setarch -R true 2>/dev/null && echo setarch -R)

.PHONY: all install demo test native pytest emulate gpu resources sanitize build-sanitizers run-sanitizers cross lint
.PHONY: format wheel bench clean distclean
.DELETE_ON_ERROR:

all: install

$(VENV)/.requirements: requirements/dev.txt
	@$(PYTHON) -c "import sys; \
	    sys.version_info >= (3, 10) or sys.exit('pyeff needs Python 3.10 or later: make PYTHON=...')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# By itself and first: it is the one package that is to come from the index of CPU builds.
	$(PIP) install --quiet --retries 1 --timeout 20 --no-deps --extra-index-url "$(TORCH_INDEX)" \
	    $$(grep '^torch==' requirements/dev.txt)
	$(PIP) install --quiet -r requirements/dev.txt
	@touch $@

# Editable, with the development module. Only a change of the build or of the native sources comes here again. In CI the
# CUDA sources are built for one architecture, another one in each turn, where their lock has the others. The
# architectures are always named, since cmake would keep those of the last time.
$(VENV)/.installed: $(VENV)/.requirements pyproject.toml setup.py scripts/build_backend.py $(NATIVE)
	PYEFF_CUDA_ARCHS="$${PYEFF_CUDA_ARCHS:-$$(PYTHONPATH=. $(BIN)/python -m benchmarks.lock archs)}" \
	    PATH="$(CURDIR)/$(BIN):$$PATH" PYEFF_DEV=1 PYEFF_REQUIRE_EXTENSION=1 \
	    $(PIP) install --quiet --no-build-isolation --no-deps -e .
	@touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/pyeff demo $(ARGS)

bench: install
	$(BIN)/pyeff bench $(ARGS)

# The native tests first: what they find is the cause of what pytest would find. The GPU kernels' resources are printed
# and kept in build/resources. How long each took is printed before pytest, whose summary, with its own time, is the last
# line. PYEFF_TURN=<number> divides the slowest of them among the turns, as CI does; without it everything is done.
TIERS := install native resources emulate
test:
	@rm -f build/tiers; mkdir -p build
	@for tier in $(TIERS); do begin=$$(date +%s); \
	    $(MAKE) --no-print-directory $$tier || { echo "make $$tier failed"; exit 1; }; \
	    echo "$$tier $$(($$(date +%s) - begin))s" >>build/tiers; done
	@echo "time:" $$(paste -s -d, build/tiers)
	@$(MAKE) --no-print-directory pytest

# What every GPU kernel takes of every architecture, and the gates; needs no GPU. Compiled is what is not locked in
# benchmarks/locks, and one in eight of the rest in turn; ARGS=--all compiles all. After a change of a GPU kernel:
# ARGS=--write, which also lists anew what is excluded.
resources: install
	$(BIN)/python scripts/gpu_resources.py $(ARGS)

# Neighbours share fixtures that take long to make: each process gets a half, and takes from the other's when it is done.
DIVIDED = -n $(JOBS) --dist worksteal

pytest: install
	PYEFF_TEST_REQUIRE=cpu,dev $(BIN)/python -m pytest $(DIVIDED) $(PYTEST_ARGS)

# The GPU's kernels on the CPU: Triton's interpreter, and CUDA C++ built by the host's compiler.
emulate: install
	PYEFF_EMULATE=1 PYEFF_TEST_REQUIRE=emulation,triton,cuda \
	    $(BIN)/python -m pytest $(DIVIDED) $(PYTEST_ARGS)

# On a machine with a GPU, with what is installed there: no network, no virtual environment.
gpu:
	PYTHON=$(PYTHON) scripts/gpu_check.sh $(ARGS)

# With PYEFF_TURN each sanitizer has one instruction set, and the long grids of the emulated kernels run in shares, but
# every kernel at least once (tests/native/main.cpp); without it all sets and all cases.
sanitize: build-sanitizers
	@$(MAKE) --no-print-directory run-sanitizers

# The arm64 build beside the sanitizers' runs, of which the longer one leaves a core to it.
native: build-sanitizers
	@$(MAKE) --no-print-directory -j2 -O run-sanitizers cross

build-sanitizers: $(VENV)/.requirements
	$(CMAKE) -S . -B build/asan -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	    -DPYEFF_SANITIZE=address,undefined -DPYEFF_ONLY_ISAS=$$($(PYTHON) scripts/turn.py isa 0) >/dev/null
	$(CMAKE) --build build/asan --target pyeff_native
	$(CMAKE) -S . -B build/tsan -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	    -DPYEFF_SANITIZE=thread -DPYEFF_ONLY_ISAS=$$($(PYTHON) scripts/turn.py isa 1) >/dev/null
	$(CMAKE) --build build/tsan --target pyeff_native

run-sanitizers:
	build/asan/pyeff_native >build/asan/run.log 2>&1 & asan=$$!; \
	$(FIXED) build/tsan/pyeff_native; tsan=$$?; \
	wait $$asan || { cat build/asan/run.log; exit 1; }; tail -n 9 build/asan/run.log; exit $$tsan

# Does the portable path compile and link for arm64? Run it, too, where an emulator is. Without the emulated GPU kernels:
# one emulation within another takes hours.
cross: $(VENV)/.requirements
	@if ! command -v $(CROSS) >/dev/null; then \
	    echo "cross: $(CROSS) is not here, so the arm64 check is skipped"; exit 0; fi; set -e; \
	$(CMAKE) -S . -B build/arm64 -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPYEFF_TORCH=OFF -DPYEFF_EMULATE=OFF \
	    -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(CROSS) >/dev/null; \
	$(CMAKE) --build build/arm64 --target pyeff_native; \
	for qemu in qemu-aarch64 qemu-aarch64-static; do \
	    if command -v $$qemu >/dev/null; then exec $$qemu -L /usr/aarch64-linux-gnu build/arm64/pyeff_native; fi; done; \
	echo "cross: built for arm64; not run (no qemu-aarch64)"

lint: $(VENV)/.requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

wheel: $(VENV)/.requirements
	PATH="$(CURDIR)/$(BIN):$$PATH" PYEFF_BUILD_DIR="$(CURDIR)/build/wheel" $(BIN)/python -m build --no-isolation --wheel

clean:
	rm -rf build dist *.egg-info pyeff/_C.abi3.so $(VENV)/.installed

distclean: clean
	rm -rf $(VENV)
