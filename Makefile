# A fresh machine needs Python 3.11 or newer with pip; everything else is set up here, inside .venv, .venv-cellpose3 and
# .venv-cellpose4, as no environment can hold both Cellpose 3 and 4.
# Torch is named in the same pip command as the library, so that pip settles on this build and does not replace it.
# Another build:           make env TORCH=torch==2.11.0
# CPU-only build on Linux: make env PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# Another interpreter:     make env PYTHON=python3.12
# More tests side by side: make test JOBS=8

PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed

# The adapter relies on how train_seg uses its lists, so it is tested with these very versions. Cellpose 4 brings torchvision,
# so what needs that is tested there as well.
CELLPOSE3 := 3.1.1.3
CELLPOSE4 := 4.2.1.1
EXTRA3 := cellpose3
EXTRA4 := cellpose
CELLPOSE_STAMPS := .venv-cellpose3/.installed .venv-cellpose4/.installed

# A file goes to one process, as its tests share cascades. In their order: xdist would leave the few but long ones for last.
SIDE_BY_SIDE = --numprocesses=$(JOBS) --dist=loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env test cellpose lint format demo

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*  ## /\1\t/p' Makefile | expand -t 10

env: $(STAMP)  ## create .venv with the library (editable) and the tools that check it

test: lint  ## ruff, mypy, pytest, and the tests with Cellpose, up to the first that fails
	$(BIN)/pytest $(SIDE_BY_SIDE)
	@$(MAKE) --no-print-directory cellpose

cellpose: $(CELLPOSE_STAMPS)  ## the tests with Cellpose alone, in environments with Cellpose 3 and with 4
	$(call test_cellpose,3)
	$(call test_cellpose,4)

lint: env  ## ruff and mypy alone
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: env  ## apply ruff's fixes and formatting
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

demo: env  ## train a small MONAI UNet with and without synthetic cells, and compare
	$(BIN)/synthaug demo

# One thread, as the networks of these tests are too small to share. With CELLPOSE set, a missing Cellpose is no reason to skip.
define test_cellpose
CELLPOSE=$(CELLPOSE$(1)) OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1 \
	  .venv-cellpose$(1)/bin/python -m pytest $(SIDE_BY_SIDE) -k "cellpose or torchvision" tests/test_cellpose*.py tests/test_frechet.py \
	  tests/test_readme.py
endef

# Installs again only when pyproject.toml has changed, or when a torch is named on the command line; into the Cellpose
# environments also when this file has, as it names their versions.
ifeq ($(origin TORCH),command line)
.PHONY: $(STAMP) $(CELLPOSE_STAMPS)
endif

$(STAMP): pyproject.toml
	$(call install,-e ".[dev]")

$(CELLPOSE_STAMPS): .venv-cellpose%/.installed: pyproject.toml Makefile
	$(call install,-e ".[$(EXTRA$*)]" "cellpose==$(CELLPOSE$*)" pytest pytest-xdist torchmetrics)

# The environment is the folder of the target.
define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "synthaug needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo not there)." \
	    "Name another one: make env PYTHON=python3.12" >&2; exit 1; }
	@$(@D)/bin/python -m pip --version >/dev/null 2>&1 || { echo "creating $(@D)"; $(PYTHON) -m venv $(@D); }
	@echo "installing $(TORCH) and synthaug into $(@D) (a few minutes the first time)"
	@$(@D)/bin/python -m pip install -q "$(TORCH)" $(1)
	@touch $@
endef
