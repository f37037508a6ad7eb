# make demo    see EdgeTune work, from nothing, on this computer (two minutes after the first set-up)
# make test    every check that a change must pass: style, types, tests
# make lint    style and types only
# make clean   remove the environment, the caches and what a build left
#
# The first call makes .venv and installs everything into it; later calls start at once. It is installed again when
# pyproject.toml changes. To use another interpreter: make clean; make test PYTHON=python3.12

PYTHON ?= python3
# The exact version, because a plain "torch" takes the newest one, which on Linux may bring gigabytes of CUDA libraries,
# while a pinned one is answered by a CPU build wherever pip has been shown one (find-links or an extra index in pip's
# own configuration, or in PIP_ARGS). Another version: make test TORCH=torch==2.9.1
TORCH ?= torch==2.13.0
PIP_ARGS ?=
EXTRAS := cpu,host,demo,test

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint clean

# Of pip's many lines, the ones that show that something moves. Errors go to stderr and are not filtered.
SHOW_PROGRESS = awk '/(Downloading|Using cached|Processing|Building wheel|Installing collected)/ && !/\.metadata/ \
	{ sub(/^ +/, ""); if (length($$0) > 110) $$0 = substr($$0, 1, 107) "..."; print "      " $$0; fflush() }'

# One index of several that lacks a package is no news; everything else on stderr is.
HIDE_NOISE = 2> >(grep --line-buffered -v '^WARNING: Location .* is ignored' >&2 || true)
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off $(PIP_ARGS)

help:
	@sed -n '/^# make/s/^# /  /p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "EdgeTune needs Python 3.10 or newer; '$(PYTHON)' is missing or older." >&2; \
		echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@echo "[1/3] $(VENV): a virtual environment with $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV); echo "python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "[2/3] Installing $(TORCH) (the largest piece: 200 MB or more, once)"
	@$(PIP_INSTALL) "$(TORCH)" $(HIDE_NOISE) | $(SHOW_PROGRESS)
	@echo "[3/3] Installing EdgeTune from this folder, with [$(EXTRAS)]"
	@$(PIP_INSTALL) "$(TORCH)" --editable ".[$(EXTRAS)]" $(HIDE_NOISE) | $(SHOW_PROGRESS)
	@touch $@
	@echo "Ready. The command is $(BIN)/edgetune"

demo: $(STAMP)
	@$(BIN)/edgetune demo

lint: $(STAMP)
	@echo "== style (ruff check)"
	@$(BIN)/ruff check --quiet .
	@echo "== layout (ruff format)"
	@$(BIN)/ruff format --quiet --check . || { echo "Not laid out as ruff does it; mend with: $(BIN)/ruff format ." >&2; exit 1; }
	@echo "== types (mypy --strict)"
	@$(BIN)/mypy --strict --no-error-summary

test: lint
	@echo "== tests (pytest)"
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
