# make PYTHON=python3.12 …  chooses the interpreter of a new .venv; make test ARGS="-k masks"  passes arguments on.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
BUILT_FROM := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

# Idle OpenMP threads that spin starve every other process; torch reads this when it is imported.
export GOMP_SPINCOUNT ?= 1000
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test sanitize lint bench bench-gpu clean

help:
	@echo "make install  create $(VENV) and install slimvit into it, for development"
	@echo "make demo     prune, fine-tune, validate and time a small model"
	@echo "make test     run the tests"
	@echo "make sanitize test the C++ kernels while AddressSanitizer and UBSan watch"
	@echo "make lint     check style and formatting"
	@echo "make bench    run the benchmark suites"
	@echo "make bench-gpu check and time the Triton kernels and whole models on a GPU"
	@echo "make clean    remove what was built; $(VENV) stays"

install: $(STAMP)

$(STAMP): $(BUILT_FROM)
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || { \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	    "slimvit needs Python 3.10 or newer, $(PYTHON) is older: make PYTHON=python3.12 install")' && \
	    $(PYTHON) -m venv --clear $(VENV); }
	@echo "Installing slimvit, torch and the rest into $(VENV): some minutes, about 6 GB"
	$(VENV)/bin/python -m pip install --quiet --editable ".[test,lint]"
	@cat slimvit/*.not_built.txt 2>/dev/null | sed "s/^/note: a module was left out: /"
	@touch $@

demo: install
	$(VENV)/bin/slimvit demo $(ARGS)

# Two processes; one where a test is looked into: make test ARGS="-n 0 --pdb"
test: install
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

sanitize: install
	$(VENV)/bin/python tests/sanitized.py $(ARGS)

lint: install
	$(VENV)/bin/python -m ruff check
	$(VENV)/bin/python -m ruff format --check

bench: install
	$(VENV)/bin/python -m pytest benchmarks --benchmark-only $(ARGS)

bench-gpu: install
	$(VENV)/bin/python benchmarks/gpu.py $(ARGS)

clean:
	rm -rf build dist *.egg-info demo-out .pytest_cache .ruff_cache .benchmarks $(STAMP)
	rm -f slimvit/*.so slimvit/*.not_built.txt
	find . -path ./$(VENV) -prune -o -name __pycache__ -prune -exec rm -rf {} +
