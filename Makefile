# make demo   install, benchmark decode throughput here, and stream a text through delta-mem layers
# make test   install, lint, and run every test against the installed wheel
# make static every Triton kernel compiled for every supported GPU, without one: registers, spills, instructions
# The rest: make lint, format, sanitize, bench, clean.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc deltamem_kernels triton_ops -name '*.[ch]*' -o -name '*.py')
CXX_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp')

.PHONY: demo test static lint format sanitize bench clean

# The package is installed as a wheel, built in isolation, so what runs is what a user gets.
$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '$(TORCH)' '$(TRITON)'
	$(BIN)/python -m pip install --quiet '.[test,bench,lint]'
	touch $@

demo: $(VENV)/installed
	mkdir -p demo
	$(BIN)/python bench/decode.py --output demo/decode.json
	$(BIN)/python examples/stream_text.py

# From tests/, so that the source tree cannot stand in for the wheel.
test: lint
	cd tests && ../$(BIN)/pytest --durations=8 .

static: $(VENV)/installed
	cd tests && TRITON_INTERPRET=0 ../$(BIN)/python lowering.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# The same tests over a build with AddressSanitizer and UndefinedBehaviorSanitizer. Compiled code of torch is not
# instrumented, and Python itself leaks by design.
SANITIZED := build/sanitized
sanitize: $(VENV)/installed
	rm -rf $(SANITIZED)
	DELTAMEM_SANITIZE=address,undefined $(BIN)/python -m pip install --quiet --no-deps --target $(SANITIZED) .
	cd tests && PYTHONPATH=$(CURDIR)/$(SANITIZED) \
	  LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  ../$(BIN)/pytest -k "cpu and not compile" .

bench: $(VENV)/installed
	mkdir -p bench/results
	for name in scan decode prefill training host; do \
	  $(BIN)/python bench/$$name.py --output bench/results/$$name.json || exit 1; done

clean:
	rm -rf $(VENV) build demo
