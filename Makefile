# Each target makes its own environment first: a clone needs nothing but python3 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -c constraints.txt
STAMP := $(VENV)/.installed
CPU_LIBRARY := kernels/_cpu*.so

TRITON36 := build/triton-3.6.0

.PHONY: install typing check test test-beside test-fast test-triton test-codegen test-triton36 test-slow fuzz sanitize \
        csrc-check bench demo docs wheel clean

install: $(STAMP)

# A library that is already there would survive a build that fails: it goes first.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*) | $(BIN)/python
	rm -f $(CPU_LIBRARY)
	$(PIP) -e '.[test]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# mypy finds the package multilora_kernels in the folder kernels/ by this link.
typing:
	mkdir -p build/typing
	ln -sfn ../../kernels build/typing/multilora_kernels

check: install typing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/*.cpp csrc/*.h csrc/*.inc
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_architecture.py

# In two parts side by side; what the second says comes when the first has ended.
test: check
	@$(MAKE) test-beside > build/test-beside.log 2>&1 & beside=$$!; \
	trap 'kill $$beside 2> /dev/null' INT TERM; \
	$(BIN)/pytest -m "not slow and not gpu" tests/test_*.py tests/kernels tests/multilora; main=$$?; \
	wait $$beside; beside=$$?; cat build/test-beside.log; exit $$((main + beside))

test-beside: install
	$(BIN)/pytest -m "not slow and not gpu" tests/bench
	$(MAKE) test-triton test-codegen

# The first case of every quick test of every layer: under a minute, for the daily loop.
test-fast: install
	$(BIN)/pytest -q --fast tests/kernels tests/multilora --ignore tests/multilora/end_to_end

# Triton interprets kernels or compiles them, for the life of a process: two runs.
test-triton: install
	TRITON_INTERPRET=1 $(BIN)/pytest tests/triton -m "not slow and not gpu"

test-codegen: install
	$(BIN)/pytest tests/codegen -m "not slow and not gpu"

# The same with the oldest triton that is supported, in a folder of its own.
test-triton36: install $(TRITON36)
	PYTHONPATH=$(TRITON36) $(MAKE) test-triton test-codegen

$(TRITON36): | $(BIN)/python
	$(BIN)/python -m pip install --no-deps --target $@.part triton==3.6.0
	mv $@.part $@

test-slow: install
	$(BIN)/pytest -m "slow and not gpu"
	TRITON_INTERPRET=1 $(BIN)/pytest tests/triton -m "slow and not gpu"
	$(BIN)/pytest tests/codegen -m "slow and not gpu"

# Traces of the engine against the solo run of every request: hours on two cores.
fuzz: install
	MULTILORA_TRACES=$${MULTILORA_TRACES:-20000} $(BIN)/pytest -s -m slow -k long_life \
		-o timeout=0 tests/multilora/end_to_end/test_fuzz.py

# The C++ library by other builds than setup.py's: build/<name>/_cpu.so.
CSRC := $(patsubst csrc/%.cpp,%,$(wildcard csrc/*.cpp))
CSRC_HEADERS := $(wildcard csrc/*.h csrc/*.inc) csrc/flags.txt
CSRC_FLAGS := $(shell grep ^- csrc/flags.txt) -fPIC
CSRC_WARNINGS := -Wpedantic -Wconversion -Wno-sign-conversion -Wcast-align -Wundef -Wvla \
                 -Wnull-dereference -Werror
CLANG ?= $(firstword $(foreach version,"" -19 -18 -17 -16 -15 -14,\
           $(notdir $(shell command -v clang++$(version)))))

# No warnings from either compiler, and nothing in a file for one instruction set that the linker
# could put in the place of another's: such symbols are weak (W, V) or unique (u).
csrc-check: $(patsubst %,build/%/_cpu.so,g++ $(CLANG))
	@! nm $(patsubst %,build/%/avx*.o,g++ $(CLANG)) | grep -E ' [WVu] '
	@test -n "$(CLANG)" || echo "No clang++ here: g++ alone was checked."

.SECONDARY:
build/g++/%.o: csrc/%.cpp $(CSRC_HEADERS)
	mkdir -p $(@D)
	g++ $(CSRC_FLAGS) $(CSRC_WARNINGS) -O3 -c $< -o $@

build/$(CLANG)/%.o: csrc/%.cpp $(CSRC_HEADERS)
	mkdir -p $(@D)
	$(CLANG) $(CSRC_FLAGS) $(CSRC_WARNINGS) -O3 -c $< -o $@

build/g++/_cpu.so: $(CSRC:%=build/g++/%.o)
	g++ -shared $^ -o $@

build/$(CLANG)/_cpu.so: $(CSRC:%=build/$(CLANG)/%.o)
	$(CLANG) -fopenmp -shared $^ -o $@

# With ASan and UBSan, under the tests of the kernels: all with the best instruction set, then those
# that do not try each by themselves with the others (a machine that lacks one runs the next lower).
# g++ only; leaks are Python's own.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZED := LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
             ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
             MULTILORA_CPP_LIBRARY=$(CURDIR)/build/sanitize/_cpu.so
SANITIZED_TESTS := $(patsubst %,tests/kernels/ops/test_%.py,attention elementwise linear lora) \
                   tests/kernels/test_index_checks.py
SANITIZED_ONCE := $(patsubst %,tests/kernels/ops/test_%.py,sampling sampling_draw) \
                  $(patsubst %,tests/kernels/cpu/test_%.py,native native_threads native_sanitizer \
                  graph buffer_pool) tests/kernels/test_packed_weight.py

sanitize: install build/sanitize/_cpu.so
	$(SANITIZED) $(BIN)/pytest -q -k "not opcheck" $(SANITIZED_TESTS) $(SANITIZED_ONCE)
	$(SANITIZED) MULTILORA_CPU_ISA=avx2 $(BIN)/pytest -q -k "not opcheck" $(SANITIZED_TESTS)
	$(SANITIZED) MULTILORA_CPU_ISA=generic $(BIN)/pytest -q -k "not opcheck" $(SANITIZED_TESTS)

build/sanitize/_cpu.so: $(CSRC:%=build/sanitize/%.o)
	g++ $(SANITIZERS) -shared $^ -o $@

build/sanitize/%.o: csrc/%.cpp $(CSRC_HEADERS)
	mkdir -p $(@D)
	g++ $(CSRC_FLAGS) $(SANITIZERS) -O1 -g1 -fno-omit-frame-pointer -c $< -o $@

bench: install
	$(BIN)/pytest bench/bench_kernels.py --benchmark-only --benchmark-columns=median,iqr,rounds
	$(BIN)/python bench/bench_gemm.py --rows 1,16,512

# The demo needs no test tools: an environment without them gets the `cli` extra alone.
demo: | $(BIN)/python
	$(BIN)/python -I -c 'import multilora_kernels, rich, tqdm, typer' 2>/dev/null || $(PIP) -e '.[cli]'
	$(BIN)/multilora demo

# The pages of docs/ and the reference from the docstrings: build/site. A dead link is an error.
docs: typing | $(BIN)/python
	$(BIN)/python -I -c 'import mkdocstrings, mkdocs, material' 2>/dev/null || $(PIP) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q -f docs/site/mkdocs.yml
	@echo build/site/index.html

wheel: install
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf build dist *.egg-info $(CPU_LIBRARY) .mypy_cache .pytest_cache .ruff_cache
	rm -f $(STAMP)

.PHONY: gpu gpu-rehearsal

# For a machine with a GPU and no network: its own python3, nothing installed; call it again to go on
# with what there was no time for. PARTS, OUT, FROM, MINUTES and TESTS: see docs/gpu.md.
gpu:
	$(PYTHON) bench/gpu.py

gpu-rehearsal: install
	OUT=$${OUT:-build/gpu-rehearsal} $(BIN)/python bench/gpu.py --rehearse
