# make demo      a fresh clone to a trained RBM, its pictures and a table of speeds
# make test      what CI runs
# make captions  a small captioner, and an RBM that re-ranks what it says, on drawn scenes
# make bench     the benchmark table
# make lint      ruff, mypy and clang-format, without building the package
# make format    what they can mend themselves

# constraints.txt pins torch to 2.13.0, for which there is a wheel for Python 3.11 and others.
PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# The package is installed, not imported from this folder, so that what is tested is what users get.
# Everything that builds the package is a prerequisite: a change in any of it installs again.
# (CONTRIBUTING.md has an editable install, which does not.)
SOURCES := setup.py pyproject.toml MANIFEST.in constraints.txt \
	$(shell find csrc rbm_kernels blip_integration -name '*.py' -o -name '*.cpp' -o -name '*.cu' -o -name '*.h')

# Without the simd_*.h: tables of one-line functions that a formatter makes unreadable.
NATIVE_SOURCES := find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h' -not -name 'simd_*'

# A process a core, with one thread each. A file's tests stay together, and share what they build.
PYTEST := ../$(BIN)/pytest -q -n auto --dist loadfile

# OpenMP threads that sleep while they wait keep their speed beside other processes, which spinning
# threads lose (rbm_kernels/openmp.py). Whoever sets one of the two variables chooses for himself.
ifeq ($(origin OMP_WAIT_POLICY)$(origin GOMP_SPINCOUNT),undefinedundefined)
export OMP_WAIT_POLICY := passive
endif

.PHONY: demo test captions lint format bench clean

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/train.stamp: .venv/bin/python $(SOURCES)
	$(PIP_INSTALL) ".[train]"
	touch $@

.venv/captions.stamp: .venv/bin/python $(SOURCES)
	$(PIP_INSTALL) ".[captioning]"
	touch $@

# With the CUDA kernels compiled for the CPU as well, which is how they are tested without a GPU.
.venv/test.stamp: .venv/bin/python $(SOURCES)
	RBM_KERNELS_CUDA_EMULATED=1 $(PIP_INSTALL) ".[train,captioning,test]"
	touch $@ .venv/train.stamp .venv/captions.stamp

.venv/bench.stamp: .venv/bin/python $(SOURCES)
	$(PIP_INSTALL) ".[train,bench]"
	touch $@ .venv/train.stamp

# The linters, and what mypy reads types of; nothing of this package is built.
.venv/lint.stamp: .venv/bin/python constraints.txt
	$(PIP_INSTALL) torch "numpy<2.4" pillow huggingface_hub ruff mypy clang-format
	touch $@

demo: .venv/train.stamp
	$(BIN)/rbm-kernels info
	$(BIN)/rbm-kernels train mnist5k --k 10 --weight-decay 1e-3 --epochs 150 --minutes 1 --out demo
	$(BIN)/rbm-kernels bench
	@echo "Pictures of the model in demo/model.safetensors:" && ls -1 demo/*.png

captions: .venv/captions.stamp
	$(BIN)/python -m benchmarks.captioning demo

lint: .venv/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(NATIVE_SOURCES) | xargs $(BIN)/clang-format --dry-run --Werror

format: .venv/lint.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(NATIVE_SOURCES) | xargs $(BIN)/clang-format -i

# From tests/, so that neither pytest nor a Python that a test starts finds this folder's rbm_kernels
# in its current directory: what is tested is the installed package.
# Then the tests of the CUDA backend once more, with the kernels emulated.
test: lint .venv/test.stamp
	$(BIN)/rbm-kernels info
	cd tests && $(PYTEST) --durations=10
	cd tests && RBM_KERNELS_CUDA_EMULATED=1 $(PYTEST) --durations=10 -k cuda ops backends

bench: .venv/bench.stamp
	$(BIN)/pytest benchmarks

clean:
	rm -rf build dist *.egg-info rbm_kernels/*.so rbm_kernels/_build_info.json
