# make demo   install, benchmark decode throughput here, and stream a text through delta-mem layers
# make recall train a tiny model's delta-mem to remember, and show what it recalls with its context gone
# make test   install, lint, and run every test against the installed wheel
# make static every Triton and CUDA kernel compiled for every supported GPU, without one: registers, spills, instructions
# make gpu    where a CUDA device is: test, compute-sanitizer and benchmark on it, without a network
# The rest: make lint, format, sanitize, emulate-sanitize, emulate-races, bench, clean.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc deltamem_kernels triton_ops -name '*.[ch]*' -o -name '*.py')
CXX_SOURCES := $(shell find csrc tests/emulation -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo recall test emulated emulate-sanitize emulate-races static static-cuda static-triton lint format sanitize bench clean \
  gpu gpu-test gpu-memcheck gpu-racecheck gpu-synccheck gpu-initcheck gpu-bench

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

# Two runs at a time on two cores. A second start goes on where the first one ended.
recall: $(VENV)/installed
	$(BIN)/python examples/recall.py --output demo/recall

# From tests/, so that the source tree cannot stand in for the wheel.
test: lint emulated
	cd tests && ../$(BIN)/pytest --durations=8 .

# The CUDA kernels compiled for the CPU, which tests load where no CUDA device is.
EMULATED := build/emulated
emulated: $(VENV)/installed
	$(BIN)/cmake -S tests/emulation -B $(EMULATED) -G Ninja $(EMULATION_OPTIONS) -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) >/dev/null
	$(BIN)/cmake --build $(EMULATED) $(EMULATION_TARGET)

# The CUDA backend's tests over emulated kernels with AddressSanitizer and UndefinedBehaviorSanitizer, under another
# order of threads than theirs. (ThreadSanitizer, which cannot share a build with them, is part of `make test`.)
SCHEDULE ?= random:1
emulate-sanitize: emulated
	$(BIN)/cmake --build $(EMULATED) --target sanitized
	cd tests && DELTAMEM_EMULATED=$(CURDIR)/$(EMULATED)/sanitized DELTAMEM_EMULATION_SCHEDULE=$(SCHEDULE) \
	  LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  ../$(BIN)/pytest -k "cuda and not compile" .

# Every op of the CUDA backend, and the planted mistakes, under ThreadSanitizer alone.
emulate-races: emulated
	cd tests && ../$(BIN)/pytest -k "race or thread_sanitizer" test_emulation.py

# Without a GPU. CUDA: the launches of its tests, with shared memory as a GPU has it, then every kernel compiled for every
# GPU. Triton: every configuration that its launchers pick, for every GPU.
static: static-cuda static-triton
LAUNCHES := $(CURDIR)/build/launches
static-cuda: $(VENV)/installed
	$(MAKE) emulated EMULATED=$(LAUNCHES) EMULATION_OPTIONS='-DDELTAMEM_RED_ZONE=0' EMULATION_TARGET='--target _cuda'
	rm -f $(LAUNCHES)/log
	cd tests && DELTAMEM_EMULATED=$(LAUNCHES) DELTAMEM_EMULATION_LAUNCHES=$(LAUNCHES)/log \
	  ../$(BIN)/pytest -k "cuda and not compile" test_delta_*.py test_cuda_*.py test_chain.py
	DELTAMEM_CUDA=1 $(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(LAUNCHES)/built .
	cd tests && ../$(BIN)/python cuda_resources.py $(LAUNCHES)/built/deltamem_kernels/_cuda.*.so \
	  --launches $(LAUNCHES)/log --output ../bench/results/cuda-resources.txt
static-triton: $(VENV)/installed
	cd tests && TRITON_INTERPRET=0 ../$(BIN)/python lowering.py --summary ../bench/results/triton-lowering.txt

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
	DELTAMEM_CUDA=0 DELTAMEM_SANITIZE=address,undefined $(BIN)/python -m pip install --quiet --no-deps --target $(SANITIZED) .
	cd tests && PYTHONPATH=$(CURDIR)/$(SANITIZED) \
	  LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  ../$(BIN)/pytest -k "cpu and not compile" .

bench: $(VENV)/installed
	mkdir -p bench/results
	for name in scan decode prefill training training_step host; do \
	  $(BIN)/python bench/$$name.py --output bench/results/$$name.json || exit 1; done

# On a machine with a CUDA device. Nothing is downloaded and no environment is made: GPU_PYTHON names a Python that has
# torch, Triton, pytest, tqdm, matplotlib and what builds the wheel. Each step also runs alone, as does each benchmark
# (make gpu-bench-decode); none stops the others. Where git does not know the sources, say DELTAMEM_COMMIT=...
GPU_PYTHON ?= python3
GPU_BUILD := $(CURDIR)/build/gpu
GPU_RUN = PYTHONPATH=$(GPU_BUILD) TRITON_INTERPRET=0 $(GPU_PYTHON)
GPU_QUERY = $(shell nvidia-smi --query-gpu=$(1) --format=csv,noheader --id=0)
GPU_NAME = $(shell echo '$(call GPU_QUERY,name)' | tr 'A-Z ' 'a-z-')
# CUDA kernels are built for this GPU alone
GPU_ARCH ?= $(patsubst 90,90a,$(subst .,,$(call GPU_QUERY,compute_cap)))
# a test compiles kernels most of its time: processes share that where pytest-xdist is
PYTEST_ARGS ?= $(shell $(GPU_PYTHON) -c "import xdist; print('-n 12 --dist worksteal')" 2>/dev/null)
GPU_TESTS ?= .
SANITIZER ?= compute-sanitizer

gpu:
	$(MAKE) -k gpu-test gpu-memcheck gpu-racecheck gpu-synccheck gpu-initcheck gpu-bench

$(GPU_BUILD)/installed: $(SOURCES)
	$(GPU_PYTHON) -c "import torch, triton; print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)"
	rm -rf $(GPU_BUILD)
	DELTAMEM_CUDA=1 DELTAMEM_CUDA_ARCHS=$(GPU_ARCH) \
	  $(GPU_PYTHON) -m pip install --quiet --no-index --no-build-isolation --no-deps --target $(GPU_BUILD) .
	touch $@

# Each word of ptx.cuh by itself, for tests/test_ptx.py.
PROBE_SOURCES := csrc/cuda/ptx.cuh csrc/cuda/shared_memory.cuh $(wildcard tests/emulation/probe*)
$(GPU_BUILD)/probe: $(GPU_BUILD)/installed $(PROBE_SOURCES)
	nvcc -std=c++20 -O3 -arch=native -Icsrc -Itests/emulation $$($(GPU_PYTHON) -m pybind11 --includes) \
	  -cudart static -shared -Xcompiler -fPIC,-fvisibility=hidden $(filter %/probe.cu %/probe_module.cpp,$(PROBE_SOURCES)) \
	  -o $(GPU_BUILD)/_probe$$($(GPU_PYTHON) -c "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))")
	touch $@

gpu-test: $(GPU_BUILD)/installed $(GPU_BUILD)/probe
	cd tests && DELTAMEM_TEST_BACKENDS=reference,cpu,triton,cuda \
	  $(GPU_RUN) -m pytest -m gpu --durations=8 $(PYTEST_ARGS) $(GPU_TESTS)

# For memcheck every allocation is its own, so that an access behind a tensor is an access behind an allocation. The checks
# of barriers and of uninitialised memory are for the CUDA kernels: Triton writes neither by hand.
gpu-memcheck: CHECKED := (triton or cuda)
gpu-memcheck: export PYTORCH_NO_CUDA_MEMORY_CACHING := 1
gpu-racecheck: CHECKED := (triton or cuda)
gpu-synccheck gpu-initcheck: CHECKED := cuda
gpu-memcheck gpu-racecheck gpu-synccheck gpu-initcheck: gpu-%: $(GPU_BUILD)/installed
	cd tests && PYTHONPATH=$(GPU_BUILD) TRITON_INTERPRET=0 $(SANITIZER) --tool $* --error-exitcode 9 \
	  $(GPU_PYTHON) -m pytest -m gpu test_gpu.py -k "public_api and $(CHECKED)"

GPU_OPTIONS_scan := --backend cuda --against triton
GPU_OPTIONS_decode := --batches 1 4 16 --backends cuda triton
GPU_OPTIONS_prefill := --tokens 2048 8192 32768 --backend cuda --against triton
GPU_OPTIONS_training := --tokens 2048 8192 --backend cuda --against triton
GPU_OPTIONS_host := --backend cuda
gpu-bench: $(addprefix gpu-bench-,scan decode prefill training training_step host)

gpu-bench-%: $(GPU_BUILD)/installed
	mkdir -p bench/results
	$(GPU_RUN) bench/$*.py --device cuda $(GPU_OPTIONS_$*) --output bench/results/$(GPU_NAME)-$*.json

clean:
	rm -rf $(VENV) build demo
