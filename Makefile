# `make demo` and `make test` do the whole set-up themselves; they need python3 (3.10 or newer), python3-venv
# and make, and nothing else. The second call finds the environment ready.

PYTHON ?= python3
VENV ?= .venv
# Processes that run tests; each uses one thread.
JOBS ?= 2
# `make EXTRAS=all,test` also installs robosuite, which needs a C compiler and the kernel's headers.
EXTRAS ?= sim,vla,train,video,data,serve,test
# An environment of their own for documentation and distributions: neither needs torch.
TOOLS := $(VENV)-tools
# Passed on to the command, for instance `make demo ARGS="--seed 1"`.
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Nothing below needs the network once the environment is there, and nothing may depend on hash order.
export PYTHONHASHSEED := 0
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
export MPLBACKEND := Agg
# Silences a notice of mkdocs-material that is no warning about the pages.
export NO_MKDOCS_2_WARNING := 1

.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all lint format docs dist

help:
	@echo "make demo      the whole method on the bundled task, about ten minutes on two cores"
	@echo "make test      the tests"
	@echo "make test-all  the tests and the slow ones"
	@echo "make lint      ruff, mypy and the import order"
	@echo "make format    ruff's formatter and its safe repairs"
	@echo "make docs      the documentation, in build/site; a warning is an error"
	@echo "make dist      wheel and sdist, in dist/, checked"
	@echo "make setup     only the environment, in $(VENV)"

setup: $(READY)

# torch comes first and by itself: it is most of the download, and everything else must accept it.
$(READY): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "wmpo-gym needs Python 3.10 or newer; name one with: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "No venv module: apt-get install python3-venv"; exit 1; }
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --constraint constraints.txt torch==2.13.0 setuptools wheel
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

demo: $(READY)
	$(BIN)/wmpo demo $(ARGS)

test: export OMP_NUM_THREADS := 1
test: $(READY)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

test-all: export OMP_NUM_THREADS := 1
test-all: $(READY)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile -m "" $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The API reference is read from the sources, so the package itself need not be installed.
$(TOOLS)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(TOOLS) || { echo "No venv module: apt-get install python3-venv"; exit 1; }
	$(TOOLS)/bin/python -m pip install --quiet --constraint constraints.txt --requirement docs/requirements.txt
	@touch $@

docs: $(TOOLS)/.ready
	$(TOOLS)/bin/mkdocs build --strict --quiet

dist: $(TOOLS)/.ready
	rm -rf dist
	$(TOOLS)/bin/python -m build --outdir dist
	$(TOOLS)/bin/python -m twine check --strict dist/*
