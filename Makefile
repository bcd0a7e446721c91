# Every target sets up .venv by itself when it is missing or stale; cpu-bench and those of the GPU use the machine's own Python instead.
PYTHON  ?= python3
TORCH   ?= torch==2.13.0
# Where cpu-bench and those of the GPU write their result files.
RESULTS ?= benchmarks/results
LEVEL   ?= quick
SECONDS_A_BACKEND ?= 0
JOBS    ?= $(shell nproc)

VENV  := .venv
PY    := $(VENV)/bin/python
DEPS  := $(VENV)/.attnhub-deps
BUILT := $(VENV)/.attnhub-built
NATIVE := CMakeLists.txt $(wildcard backends/*/CMakeLists.txt) $(wildcard backends/*/kernels/*.cpp backends/*/kernels/*.cc backends/*/kernels/*.h backends/*/kernels/*.hpp backends/*/kernels/*.inc backends/*/kernels/*.map)
SOURCES := attnhub backends integrations tests examples
# Tests run in two processes; a thread pool in each of them would only make them wait for one another.
RUN_TESTS := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PY) -m pytest -q -n 2

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all test-wheel lint typings matrix docs bench cpu-bench gpu-check gpu-test gpu-bench cuda-bench gpu-models gpu-judge clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# torch goes first and alone: resolved together with the rest, another package's wish could bring another torch.
$(DEPS): pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet '$(TORCH)'
	$(PY) -m pip install --quiet --editable '.[dev]'
	touch $@

# Libraries that an in-place build left beside the sources would be found before the ones built here.
$(BUILT): $(DEPS) $(NATIVE)
	rm -f backends/*/libattnhub_*.so
	$(PY) -m pip install --quiet --no-deps --editable .
	touch $@

venv: $(BUILT) ## the virtual environment with everything that development needs

demo: $(BUILT) ## a real model patched, generated from and exported, every step checked
	HF_HUB_OFFLINE=1 $(PY) -m attnhub demo

test: $(BUILT) ## all tests but the long and the GPU ones, then a smoke test of the wheel
	$(RUN_TESTS) -m "not long and not gpu"
	@$(MAKE) --no-print-directory test-wheel

test-all: $(BUILT) ## the long tests too
	$(RUN_TESTS) -m "not gpu"
	@$(MAKE) --no-print-directory test-wheel

# The throw-away environment sees the packages of .venv through a .pth file, whose own .pth files (the editable attnhub) are not read.
test-wheel: $(BUILT) ## the wheel, installed elsewhere and tested from another folder
	rm -rf build/smoke
	$(PY) -m pip wheel --quiet --no-deps --wheel-dir build/smoke/wheel .
	$(PY) -m venv --without-pip build/smoke/venv
	$(PY) -m pip --python build/smoke/venv/bin/python install --quiet --no-deps build/smoke/wheel/*.whl
	$(PY) -c "import site; print(site.getsitepackages()[0])" > "$$(build/smoke/venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/dependencies.pth"
	cd build/smoke && OMP_NUM_THREADS=2 ATTNHUB_TEST_INSTALLED=1 venv/bin/python -m pytest -q -p no:cacheprovider $(CURDIR)/tests/test_installed.py

lint: $(BUILT) ## style, types, generated pages, and imports that would make a second copy of every class
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(PY) -m attnhub docs --check
	@! grep -rnE '^[[:space:]]*(from|import)[[:space:]]+(backends|integrations)([.[:space:]]|$$)' --include='*.py' $(SOURCES) \
		|| { echo 'import attnhub.backends and attnhub.integrations instead'; exit 1; }

typings: ## the symlinks through which type checkers resolve attnhub.backends in a checkout
	rm -rf typings/attnhub && mkdir -p typings/attnhub
	cd typings/attnhub && for entry in ../../attnhub/*; do case $$entry in *__pycache__*) ;; *) ln -s $$entry .;; esac; done
	cd typings/attnhub && ln -s ../../backends ../../integrations .

matrix: $(BUILT) ## write docs/support-matrix.md from the declarations
	$(PY) -m attnhub matrix --write

docs: $(BUILT) ## write every generated page
	$(PY) -m attnhub docs

bench: $(BUILT) ## time this machine's CPU, keep the result files, and write the pages made from them
	@for threads in $$(printf '1\n%s\n' $(JOBS) | sort -nu); do \
		$(PY) -m attnhub bench cpu --preset limits --threads $$threads --output benchmarks/results/ || exit 1; done
	$(PY) -m attnhub bench cpu --preset kylin --threads $(JOBS) --output benchmarks/results/
	$(PY) -m attnhub bench overhead --device cpu --output benchmarks/results/
	$(PY) -m attnhub bench models --preset cpu --threads $(JOBS) --output benchmarks/results/
	$(PY) -m attnhub docs

GPU = $(shell PYTHONPATH=$(CURDIR) $(PYTHON) -c "import torch; from attnhub.bench.results import slug; print(slug(torch.cuda.get_device_name()))")

# Those below need a GPU machine with torch, and no network: they run the bare checkout.
# Both parts run, whatever the first one finds. The second needs pytest and pytest-xdist.
gpu-check: ## conformance of the GPU backends, and the CUDA kernels under stress, from the bare checkout with $(PYTHON)
	@if [ ! -f backends/cpu/libattnhub_cpu.so ] && command -v cmake >/dev/null; then \
		cmake -S . -B build/dev -DATTNHUB_INPLACE=ON >/dev/null && cmake --build build/dev -j >/dev/null; fi
	-PYTHONPATH=$(CURDIR) $(PYTHON) -m attnhub doctor
	@failed=0; \
	PYTHONPATH=$(CURDIR) $(PYTHON) -m attnhub.testing --backend cuda,triton --device cuda --level $(LEVEL) --jobs $(JOBS) \
		--seconds $(SECONDS_A_BACKEND) --output $(RESULTS)/$(GPU)/conformance.json || failed=1; \
	PYTHONPATH=$(CURDIR) $(PYTHON) -m pytest -q -n $(JOBS) -p no:cacheprovider $(GPU_STRESS) || failed=1; \
	exit $$failed

GPU_STRESS := $(addprefix tests/backends/test_cuda_,device.py hard_scores.py sanitizer.py)

gpu-test: ## the tests that need a GPU, from the bare checkout with $(PYTHON), which needs pytest and pytest-xdist
	PYTHONPATH=$(CURDIR) $(PYTHON) -m pytest -q -n $(JOBS) -m "gpu and not long" -p no:cacheprovider tests

GPU_PRESETS ?= v1v2 memory fp8 decode features grid
# What goes to every preset: `--limit 300` begins no case after so many seconds, `--resume` measures what a stopped run left.
GPU_OPTIONS ?=

# A result file is written after every case, so that a run that is stopped has lost one. `attnhub bench gpu --list --preset NAME` estimates
# the time: on 16 processors about one minute for v1v2 and memory, two for decode and features, six for grid.
gpu-bench: ## time the GPU backends beside torch's kernels and FlexAttention, from the bare checkout with $(PYTHON)
	@for preset in $(GPU_PRESETS); do \
		PYTHONPATH=$(CURDIR) $(PYTHON) -m attnhub bench gpu --preset $$preset --output $(RESULTS)/ $(GPU_OPTIONS) || exit 1; done
	PYTHONPATH=$(CURDIR) $(PYTHON) -m attnhub bench overhead --device cuda --output $(RESULTS)/

CUDA_PRESETS ?= cuda-grid cuda-sustained cuda-features cuda-decode cuda-few cuda-short cuda-portable

# `make cuda-bench CUDA_PRESETS=cuda-decode` is one of them; each is estimated below 150 s on 16 processors.
cuda-bench: ## time the cuda backend alone beside its peers, and hold it against its targets
	@$(MAKE) --no-print-directory gpu-bench GPU_PRESETS="$(CUDA_PRESETS)"
	@$(MAKE) --no-print-directory gpu-judge GPU_PRESETS="$(CUDA_PRESETS)"

# Needs transformers, and a card with 80 GB. Tiny models try the path anywhere: `attnhub bench models --preset gpu --device cpu --scale tiny`.
gpu-models: ## time whole models on the GPU, from the bare checkout with $(PYTHON)
	PYTHONPATH=$(CURDIR) $(PYTHON) -m attnhub bench models --preset gpu --output $(RESULTS)/ $(GPU_OPTIONS)
	-PYTHONPATH=$(CURDIR) $(PYTHON) -m attnhub bench judge --input $(RESULTS)/$(GPU)/models-gpu.json

# There are no targets for fp8.
gpu-judge: ## hold the GPU's result files against the targets
	@failed=0; for preset in $(filter-out fp8,$(GPU_PRESETS)); do echo "$$preset"; \
		PYTHONPATH=$(CURDIR) $(PYTHON) -m attnhub bench judge --input $(RESULTS)/$(GPU)/gpu-$$preset.json || failed=1; done; \
	echo overhead; PYTHONPATH=$(CURDIR) $(PYTHON) -m attnhub bench judge --input $(RESULTS)/$(GPU)/overhead-cuda.json || failed=1; exit $$failed

CPU_PRESETS ?= limits kylin

# Needs torch and a C++ compiler with cmake, and no network. ONNX Runtime takes part where it is installed.
cpu-bench: ## time the CPU on one thread and on all, from the bare checkout with $(PYTHON)
	cmake -S . -B build/dev -DATTNHUB_INPLACE=ON >/dev/null && cmake --build build/dev -j >/dev/null
	@for preset in $(CPU_PRESETS); do for threads in $$(printf '1\n%s\n' $(JOBS) | sort -nu); do \
		echo "$$preset, threads: $$threads"; \
		PYTHONPATH=$(CURDIR) $(PYTHON) -m attnhub bench cpu --preset $$preset --threads $$threads --output $(RESULTS)/ || exit 1; \
	done; done

clean: ## remove what was built; .venv stays
	rm -rf build .pytest_cache .mypy_cache .ruff_cache backends/*/libattnhub_*.so
