# Everything from a fresh machine: Python 3.11 or newer and a C++ compiler are all that must be there.
#
#   make demo    watch models take turns on simulated GPUs        make test    the whole test suite
#   make check   tests, lint, types, layers, generated documents    make bench   the benchmarks
#   make browser the page's tests in Chromium                      make screenshots  the README's pictures
#   make asan    the allocator's tests under AddressSanitizer      make tsan    its threads under ThreadSanitizer (both: GCC)
#
# PYTHON=python3.12 picks an interpreter; ARGS="--keep" is handed to the demo, TEST_ARGS to pytest; JOBS is how many cores.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
# One more than there are cores: system tests wait for processes most of their time.
WORKERS ?= $(shell expr $(JOBS) + 1)
ARGS ?=
TEST_ARGS ?=
ASAN_EXAMPLES ?= 40
TSAN_ROUNDS ?= 1500
FUZZ_EXAMPLES ?= 400
NATIVE := CMakeLists.txt $(wildcard allocator/csrc/* allocator/sim/*.cpp allocator/sim/*.h)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: audit fuzz wheel units compiler demo test test-long asan tsan lint types layers docs docs-current check bench browser screenshots chromium clean
.DEFAULT_GOAL := check

demo: $(VENV)/.ready-to-run
	$(BIN)/rotator demo $(ARGS)

test: $(VENV)/.ready-to-test
	$(BIN)/pytest -n $(WORKERS) --dist worksteal $(TEST_ARGS)

# The property tests with many more examples: minutes, not part of the suite.
test-long: $(VENV)/.ready-to-test
	ROTATOR_EXAMPLES=5000 $(BIN)/pytest -n $(JOBS) --timeout 1800 tests/unit/core tests/system/allocator

# The tests that take most of the native code's paths. Python and its own leaks are not checked; a test that means to
# fault must fault. Both libraries are loaded first, because Python was not linked with them.
ASAN_TESTS := $(addprefix tests/system/allocator/test_allocator_,sleep.py packing.py lanes.py sweep.py rollback.py fence.py elastic.py \
  background.py pins.py host.py model.py)
asan: build/asan/.built
	libraries=$$(ldd build/asan/allocator/_lib/librotator_alloc.so | awk '/lib(asan|stdc\+\+)\.so/ {printf "%s ", $$3}') && \
	LD_PRELOAD="$$libraries" ASAN_OPTIONS=detect_leaks=0:handle_segv=0:detect_stack_use_after_return=1 \
	  ROTATOR_ALLOCATOR_LIBRARIES=build/asan/allocator/_lib ROTATOR_EXAMPLES=$(ASAN_EXAMPLES) \
	  $(BIN)/python -m pytest -p no:cacheprovider -k "not 999" $(ASAN_TESTS)

# Addresses must lie where the sanitizer expects them, so their randomization is switched off where that is allowed.
tsan: build/tsan/.built
	box=$$(mktemp -d) && trap 'rm -rf "$$box"' EXIT && \
	fixed=$$(setarch -R true 2> /dev/null && echo setarch -R || true) && \
	TSAN_OPTIONS=halt_on_error=0:second_deadlock_stack=1 \
	  $$fixed build/tsan/objects/tsan_allocator build/tsan/objects "$$box" $(TSAN_ROUNDS)

# The page before a real Chromium.
browser: $(VENV)/.ready-to-test chromium
	$(BIN)/pytest -m browser tests/browser $(TEST_ARGS)

screenshots: $(VENV)/.ready-to-test chromium
	$(BIN)/python -m bench.pictures docs/images

lint: $(VENV)/.ready-to-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready-to-test
	$(BIN)/mypy --strict

layers: $(VENV)/.ready-to-test
	$(BIN)/lint-imports

# What is made from the types; the tests say when it is no longer current.
docs: $(VENV)/.ready-to-test
	$(BIN)/rotator schema > docs/fleet.schema.json
	$(BIN)/rotator schema --markdown > docs/configuration.md
	$(BIN)/rotator schema --commands > docs/cli.md
	$(BIN)/rotator schema --metrics > docs/metrics.md
	$(BIN)/rotator schema --rest > docs/rest.md
	$(BIN)/rotator jobs schema recipe > docs/recipe.schema.json
	$(BIN)/rotator jobs schema site > docs/site.schema.json
	$(BIN)/rotator jobs schema --markdown > docs/jobs-keys.md

# Known vulnerabilities among the dependencies. Without a way to the advisory service it says so, and does not fail.
audit: $(VENV)/.ready-to-test
	$(BIN)/python -m bench.audit

# Bytes and values that nobody would send, many more than in the suite: minutes.
fuzz: $(VENV)/.ready-to-test
	ROTATOR_FUZZ=$(FUZZ_EXAMPLES) $(BIN)/pytest --timeout 3600 tests/contract/security/test_fuzz.py $(TEST_ARGS)

docs-current: $(VENV)/.ready-to-test
	@for pair in "--no-markdown docs/fleet.schema.json" "--markdown docs/configuration.md" "--commands docs/cli.md" \
	  "--metrics docs/metrics.md" "--rest docs/rest.md"; do \
	  set -- $$pair; \
	  $(BIN)/rotator schema $$1 | diff -u "$$2" - || { echo "$$2 is not current: run 'make docs'" >&2; exit 1; }; \
	done
	@for pair in "recipe docs/recipe.schema.json" "site docs/site.schema.json" "--markdown docs/jobs-keys.md"; do \
	  set -- $$pair; \
	  $(BIN)/rotator jobs schema $$1 | diff -u "$$2" - || { echo "$$2 is not current: run 'make docs'" >&2; exit 1; }; \
	done

check: test lint types layers docs-current

bench: $(VENV)/.ready-to-test
	$(BIN)/python -m bench.planner
	$(BIN)/python -m bench.gateway

# A wheel from the tree, tried in a fresh environment as a machine would have it: what deploy/Containerfile does.
wheel: | compiler $(BIN)/python
	rm -rf build/wheel dist/rotator-*.whl
	$(BIN)/python -m pip wheel --disable-pip-version-check --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -m venv build/wheel
	build/wheel/bin/python -m pip install --disable-pip-version-check --quiet dist/rotator-*.whl
	cd build/wheel && bin/rotator --version && bin/rotator schema > fleet.schema.json && bin/rotator agent --help > agent.txt
	cmp build/wheel/fleet.schema.json docs/fleet.schema.json
	@ls -l dist/rotator-*.whl

# systemd's own opinion of the units, with a program where they expect one.
units:
	root=$$(mktemp -d) && trap 'rm -rf "$$root"' EXIT && \
	install -D /bin/true $$root/opt/rotator/bin/rotator && install -D /bin/true $$root/opt/rotator/bin/python && \
	for unit in deploy/systemd/*.service; do \
	  sed "s#/opt/rotator#$$root/opt/rotator#" $$unit > $$root/$$(basename $$unit) && \
	  systemd-analyze verify $$root/$$(basename $$unit) && \
	  systemd-analyze security --offline=true --threshold=45 $$root/$$(basename $$unit) | tail -n 1; \
	done

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# -- set-up: a stamp says for which pyproject.toml and native sources the environment was made ---------------------------

$(VENV)/.ready-to-run: pyproject.toml $(NATIVE) | compiler $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.ready-to-test: pyproject.toml $(NATIVE) | compiler $(BIN)/python
	$(PIP) -e '.[dev]'
	@touch $(VENV)/.ready-to-run $@

# One build of the libraries for each sanitizer; what is compiled stays, so the next one is quick.
build/%/.built: $(NATIVE) tests/native/tsan_allocator.cpp | $(VENV)/.ready-to-test
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(PIP) --no-deps --upgrade --target build/$* -C build-dir=build/$*/objects \
	  -C wheel.packages=allocator -C cmake.build-type=None -C "cmake.define.CMAKE_CXX_FLAGS=-O1 -g" \
	  -C cmake.define.ROTATOR_$(shell echo $* | tr a-z A-Z)=ON .
	@touch $@

compiler:
	@command -v c++ > /dev/null || command -v g++ > /dev/null || command -v clang++ > /dev/null \
	  || { echo "A C++17 compiler is missing: install g++ or clang++ (Debian, Ubuntu: apt install g++)." >&2; exit 1; }

chromium:
	@$(BIN)/python -m bench.chromium > /dev/null 2>&1 \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && apt-get update -qq \
	       && apt-get install -y -qq --no-install-recommends chromium > /dev/null; } \
	  || $(BIN)/python -m bench.chromium

# Candidates are run, not only found: a shim may stand for a version that is not installed.
$(BIN)/python:
	@for candidate in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.14; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1; then \
	    "$$candidate" -m venv $(VENV) && exit 0; \
	    rm -rf $(VENV); \
	    echo "$$candidate cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; \
	  fi; \
	done; \
	echo "Python 3.11 or newer is missing: install it, or name it with 'make PYTHON=/path/to/python3.12 ...'." >&2; exit 1
