.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?= configs/demo.toml
STAMP := $(VENV)/.installed

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s "$$(printf '\t')"

setup: $(STAMP)  ## a virtual environment with every pinned package

$(STAMP): pyproject.toml constraints.txt requirements-data.txt
	@command -v $(PYTHON) >/dev/null || { echo "HLLM needs CPython 3.11 ($(PYTHON) not found; say make PYTHON=/path/to/python3.11)"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || { echo "python3.11 cannot make virtual environments: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[airflow,test,bench,dev]'
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed  # has no wheels; reads the torch above
	$(BIN)/pip install --quiet --no-deps --requirement requirements-data.txt
	@touch $@

demo: setup  ## the real DAGs on MovieLens-100K, from log to champion, in six to ten minutes
	$(BIN)/python -m hllm.demo --config $(CONFIG)

ui: setup  ## the pages of Airflow and MLflow, until Ctrl-C
	$(BIN)/python -m hllm.demo --config $(CONFIG) --ui

stop: setup  ## end what demo or ui left running
	$(BIN)/python -m hllm.demo --stop

test: setup  ## the tests (no root, no server installed beforehand)
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not cluster"

test-fast: setup  ## models, evaluation, data, settings and documents, in under two minutes
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not cluster" tests/models tests/evaluation tests/data/test_cells.py tests/data/test_ids.py tests/data/test_ingest.py tests/training/test_batches.py tests/settings tests/test_docs.py

test-slow: setup  ## the longer proofs
	$(BIN)/pytest -m "slow and not cluster"

chaos: setup  ## commands killed at any moment, full disks, flipped bits, broken stores; the same command mends it
	$(BIN)/python -m tests.chaos --tries 125

cluster-test: setup  ## the DAGs as pods in a real Kubernetes, and what goes wrong there (tests/cluster/run says what it needs)
	tests/cluster/run $(BIN)/pytest

bench: setup  ## every speed and memory figure beside its peer, in one table
	$(BIN)/python benchmarks/all.py

lint: setup  ## ruff, mypy, and what may import what
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: help setup demo ui stop test test-fast test-slow chaos cluster-test bench lint
