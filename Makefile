# Everything a newcomer needs: `make demo`, `make test`. Each target sets up what it uses.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
SOURCES := $(shell find csrc -type f) CMakeLists.txt pyproject.toml
PACKAGE := $(VENV)/.pentad-installed
TOOLS := $(VENV)/.tools-installed
DEPENDENCIES := $(VENV)/.dependencies-installed
CMAKE_ARGS := -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DPENTAD_CUDA=OFF \
  -DCCACHE=$(abspath $(BIN))/ccache

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
# The package, the C++ tests and the wheel compile the same kernels: once, as the cache knows them by
# paths relative to this directory, and by the compiler's name.
export CCACHE_BASEDIR := $(CURDIR)
export CXX

# CUDA kernels take longer to compile than all others together: they are built where a device could run
# them, and by `make build-cuda`. (pip alone, without make, builds them wherever nvcc is.)
export PENTAD_CUDA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo AUTO || echo OFF)

.PHONY: help install demo test test-python test-cpp test-sanitize test-aarch64 \
  test-cuda-host test-gpu lint format bench bench-gpu build-cuda wheel sdist sdist-check docs pictures numerics clean

help:
	@echo "make demo     set up and show the whole package on real input, with a report"
	@echo "make test     set up and run every test"
	@echo "make docs     build the documentation into site/"
	@echo "make test-gpu, bench-gpu  the same on a CUDA device; build-cuda: a wheel with its kernels"
	@echo "make install lint format bench wheel sdist sdist-check pictures numerics clean"
	@echo "make test-python test-cpp test-sanitize test-aarch64 test-cuda-host"

# --- Set-up: a virtual environment, pinned dependencies, the package ------------------------------

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# What compiles and packs is enough for the C++ tests and for what is shipped.
$(TOOLS): constraints.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt pip
	$(BIN)/python tools/requirements.py build >$(VENV)/requirements-build.txt
	$(BIN)/python -m pip install -q -c constraints.txt -r $(VENV)/requirements-build.txt
	@touch $@

$(DEPENDENCIES): $(TOOLS)
	$(BIN)/python tools/requirements.py search torch encoders bench demo dev >$(VENV)/requirements.txt
	$(BIN)/python -m pip install -q -c constraints.txt -r $(VENV)/requirements.txt
	@touch $@

$(PACKAGE): $(DEPENDENCIES) $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

install: $(PACKAGE)

# --- The main job ----------------------------------------------------------------------------------

demo: install
	$(BIN)/pentad demo --out build/demo $(DEMO_ARGS)

# --- Tests -----------------------------------------------------------------------------------------

test: test-cpp test-sanitize test-python

# A process for each core; a file's tests stay together. Threads that wait for work must not spin.
test-python: install
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

build/cpp/build.ninja build/sanitize/build.ninja: $(TOOLS) CMakeLists.txt
	$(BIN)/cmake -S . -B $(@D) $(CMAKE_ARGS) -DPENTAD_TESTS=ON \
	  $(if $(findstring sanitize,$@),-DPENTAD_SANITIZE=address$(comma)undefined,-DPENTAD_BENCH=ON)
comma := ,

test-cpp: build/cpp/build.ninja
	$(BIN)/cmake --build build/cpp
	$(BIN)/ctest --test-dir build/cpp --output-on-failure -j $(JOBS)

# The same tests under the address and undefined-behaviour sanitizers.
test-sanitize: build/sanitize/build.ninja
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure -LE speed -j $(JOBS)

# The NEON kernels, cross-compiled and emulated. SAMPLE=1: the quick ones (attention and scan take
# most of a minute each).
SAMPLED := $(if $(SAMPLE),hamming matrix_definition pq_lookup scan_definition sparse_score sparse_splade)
test-aarch64: $(TOOLS)
	@if ! command -v aarch64-linux-gnu-g++ >/dev/null || ! command -v qemu-aarch64 >/dev/null; then \
	  echo "test-aarch64 skipped: it needs g++-aarch64-linux-gnu and qemu-user"; \
	else \
	  $(BIN)/cmake -S . -B build/aarch64 $(CMAKE_ARGS) -DPENTAD_TESTS=ON \
	    -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake && \
	  $(BIN)/cmake --build build/aarch64 $(if $(SAMPLE),--target $(SAMPLED:%=test_%)) && \
	  $(BIN)/ctest --test-dir build/aarch64 --output-on-failure -LE 'speed|fork' -j $(JOBS) \
	    $(if $(SAMPLE),-R '^($(subst $(eval) ,|,$(SAMPLED)))$$'); \
	fi

# The families' tests over their CUDA kernels, which are executed on the CPU (csrc/README.md): what the
# C++ tests say of the kernels, these say of the way from Python to them. An environment of its own
# sees the packages of the other one, but for its pentad. SAMPLE=10: one test in ten.
CUDA_HOST := build/cuda-host
CUDA_HOST_TESTS := tests/test_attention_hopper.py tests/test_hamming.py tests/test_hamming_device_index.py \
  tests/test_attention_decode.py \
  tests/test_scan_recurrence.py tests/test_scan_matrix_errors.py \
  $(addprefix tests/test_sparse_,splade.py score.py topk.py multi.py device_index.py) \
  $(addprefix tests/test_pq_,lookup.py adc.py assign.py codes.py quantize.py on_devices.py product_keys.py \
  product_key_memory.py)
# Of these, thousands of combinations of options, one in forty.
CUDA_HOST_SAMPLED := $(addprefix tests/test_attention,.py _api.py _block_mask.py _extension.py \
  _options.py _sdpa.py _strides.py) \
  $(addprefix tests/test_scan_,conv.py selective.py ssd.py linear_attention.py delta_rule.py \
  matrix_api.py matrix_modules.py)
test-cuda-host: $(DEPENDENCIES)
	@if ! [ -e $(CUDA_HOST)/bin/python ]; then \
	  $(BIN)/python -m venv --without-pip $(CUDA_HOST) && \
	  $(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	    >"$$($(CUDA_HOST)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/others.pth"; \
	fi
	PENTAD_CUDA=HOST PATH="$(abspath $(BIN)):$$PATH" $(CUDA_HOST)/bin/python -m pip install -q \
	  --no-build-isolation --no-deps --force-reinstall -C build-dir=build/cuda-host-objects .
	OMP_WAIT_POLICY=passive $(CUDA_HOST)/bin/python -m pytest -n $(JOBS) --dist loadfile \
	  --sample $(or $(SAMPLE),1) $(CUDA_HOST_TESTS)
	OMP_WAIT_POLICY=passive $(CUDA_HOST)/bin/python -m pytest -n $(JOBS) \
	  --sample $$((40 * $(or $(SAMPLE),1))) $(CUDA_HOST_SAMPLED)

# The tests that need a CUDA device, then some of them under each tool of compute-sanitizer. Where
# there is no device they are skipped, and say so.
test-gpu: install
	$(BIN)/python -m pytest -rs tests/test_gpu_*.py tests/test_attention_hopper.py
	@if command -v compute-sanitizer >/dev/null && nvidia-smi -L >/dev/null 2>&1; then \
	  for tool in memcheck racecheck synccheck; do \
	    compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python -m pytest -x \
	      tests/test_gpu_*.py -k same_results || exit 1; \
	  done; \
	else \
	  echo "compute-sanitizer skipped: it needs the tool and a device"; \
	fi

# A wheel with CUDA kernels, wherever nvcc is; it imports without a driver.
build-cuda: $(DEPENDENCIES)
	@if ! command -v nvcc >/dev/null; then echo "build-cuda skipped: there is no nvcc"; else \
	  rm -rf build/wheel-cuda && \
	  PENTAD_CUDA=ON PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip wheel -q \
	    --no-build-isolation --no-deps -C install.strip=true -C build-dir=build/cuda \
	    -w build/wheel-cuda . && \
	  $(BIN)/python tools/check_wheel.py build/wheel-cuda/*.whl; \
	fi

# --- Style -----------------------------------------------------------------------------------------

NATIVE := $(shell find csrc tests/cpp bench/cpp -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc')

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/python bench/report.py --check

format: $(DEPENDENCIES)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

# --- Measurements and packaging --------------------------------------------------------------------

bench: install
	$(BIN)/pentad bench $(BENCH_ARGS)

# On a CUDA device; figures go to bench/results/gpu-*.json.
bench-gpu: install
	$(BIN)/python bench/gpu_attention.py
	$(BIN)/python bench/gpu_hamming.py
	$(BIN)/python bench/gpu_pq.py
	$(BIN)/python bench/gpu_decode.py
	$(BIN)/python bench/gpu_sparse.py
	$(BIN)/python bench/gpu_matrix_scan.py
	$(BIN)/python bench/gpu_scan.py

# A wheel that auditwheel accepts, and the proof that it imports beside nothing but numpy.
wheel: $(TOOLS)
	rm -rf dist build/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip wheel -q --no-build-isolation --no-deps \
	  -C install.strip=true -w build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair -w dist build/wheel/*.whl
	$(BIN)/python tools/check_wheel.py dist/*.whl

sdist: $(TOOLS)
	rm -rf dist/*.tar.gz
	$(BIN)/python -c "from scikit_build_core.build import build_sdist; print(build_sdist('dist'))"

# The source distribution builds a wheel from its own files, with nothing fetched.
sdist-check: sdist
	rm -rf build/sdist && mkdir -p build/sdist
	tar -xzf dist/*.tar.gz --strip-components=1 -C build/sdist
	cd build/sdist && PATH="$(abspath $(BIN)):$$PATH" $(abspath $(BIN))/python -m pip wheel -q \
	  --no-build-isolation --no-deps --no-index -w wheel .
	$(BIN)/python tools/check_wheel.py build/sdist/wheel/*.whl

# --- Documentation ---------------------------------------------------------------------------------

DOCUMENTATION := $(VENV)/.documentation-installed

$(DOCUMENTATION): constraints.txt pyproject.toml | $(BIN)/python
	$(BIN)/python tools/requirements.py docs >$(VENV)/requirements-docs.txt
	$(BIN)/python -m pip install -q -c constraints.txt -r $(VENV)/requirements-docs.txt
	@touch $@

# The site, in site/. It is made from text alone: the package need not be built.
docs: $(DOCUMENTATION)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# What the site shows of real computations: the pictures, and the table of measured errors.
pictures: install
	$(BIN)/python tools/docs/pictures.py

numerics: install
	$(BIN)/python tools/docs/numerics.py

clean:
	rm -rf build dist site $(VENV)
