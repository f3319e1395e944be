# One entry point for people and for CI. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The first of these that is Python 3.11, 3.12 or 3.13 makes the environment.
PYTHON ?= python3 python3.13 python3.12 python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Where `make run` keeps its node, and where the node listens.
RUN_DATA ?= .run
RUN_HTTP ?= 127.0.0.1:8080
RUN_DIMSE ?= 127.0.0.1:11112

# Debian packages that the benchmark and the tests talk to.
PEERS := dcmtk orthanc orthanc-dicomweb
SYSTEM_PACKAGES ?= $(PEERS) chromium

# More arguments for pytest: make test PYTEST="-k forwarding -x"
PYTEST ?=
# One group of the benchmark: make bench BENCH=cstore
BENCH ?=

.PHONY: help setup system run test lint check bench docs lock clean

help: ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(STAMP) ## install what is needed into .venv, at the locked versions

$(STAMP): requirements-dev.lock pyproject.toml
	@if [ ! -x $(BIN)/python ]; then \
	  for candidate in $(PYTHON); do \
	    if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	      echo "making $(VENV) with $$("$$candidate" --version)"; \
	      "$$candidate" -m venv $(VENV); \
	      break; \
	    fi; \
	  done; \
	  test -x $(BIN)/python || { echo "Huying needs Python 3.11, 3.12 or 3.13: install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }; \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --require-hashes -r requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --no-index -e .
	@touch $@

system: ## install the Debian packages that tests and benchmark need (root)
	@tests/support/system-packages.sh $(SYSTEM_PACKAGES)

run: setup ## start a node on loopback with studies to look at
	$(BIN)/huying demo --serve --data $(RUN_DATA) --http $(RUN_HTTP) --dimse $(RUN_DIMSE)

test: setup system ## run every test
	$(BIN)/python -m pytest $(PYTEST)

lint: setup ## format, lint, types
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy .

check: lint ## lint, and the quick tests, architecture among them
	$(BIN)/python -m pytest -q -m "not slow" $(PYTEST)

bench: SYSTEM_PACKAGES := $(PEERS)
bench: setup system ## compare with Orthanc and DCMTK on the same data
	$(BIN)/python -m tests.bench $(BENCH)

docs: setup ## write the pages of docs/reference from the program
	$(BIN)/python -m tests.support.reference

# The locks hold versions and hashes for all platforms, and no addresses.
UV := build/lock/bin/uv
COMPILE := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes \
  --no-header --no-emit-index-url --no-emit-find-links --annotation-style line

lock: ## renew requirements*.lock from pyproject.toml; LOCK=--upgrade for newer versions
	test -x $(UV) || { python3 -m venv build/lock && build/lock/bin/pip install --quiet uv; }
	$(COMPILE) $(LOCK) --extra dev --output-file requirements-dev.lock pyproject.toml
	$(COMPILE) $(LOCK) --constraint requirements-dev.lock --output-file requirements.lock pyproject.toml

clean: ## remove caches, the environment and the node of `make run`
	rm -rf $(VENV) $(RUN_DATA) .bench build .mypy_cache .pytest_cache .ruff_cache .hypothesis
