# A fresh machine needs Python 3.11 or newer with pip; everything else is set up here, inside .venv.
# Torch is named in the same pip command as the library, so that pip settles on this build and does not replace it.
# Another build:           make env TORCH=torch==2.11.0
# CPU-only build on Linux: make env PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# Another interpreter:     make env PYTHON=python3.12

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env test lint format demo

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*  ## /\1\t/p' Makefile | expand -t 10

env: $(STAMP)  ## create .venv with the library (editable) and the tools that check it

test: lint  ## ruff, mypy and pytest, up to the first that fails
	$(BIN)/pytest

lint: env  ## ruff and mypy alone
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: env  ## apply ruff's fixes and formatting
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

demo: env  ## train a small MONAI UNet with and without synthetic cells, and compare
	$(BIN)/synthaug demo

# Installs again only when pyproject.toml has changed, or when a torch is named on the command line.
ifeq ($(origin TORCH),command line)
.PHONY: $(STAMP)
endif

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "synthaug needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo not there)." \
	    "Name another one: make env PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "creating .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing $(TORCH) and synthaug into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install -q "$(TORCH)" -e ".[dev]"
	@touch $(STAMP)
