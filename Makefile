.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FOOTAGE := out/footage
OUT := out/demo
TRAINED := out/trained

# Many short processes import the product. Without its bytecode, each would compile it anew.
unexport PYTHONDONTWRITEBYTECODE

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## make .venv with everything pinned

$(STAMP): requirements.txt requirements-dev.txt pyproject.toml
	@echo "installing into $(VENV): some minutes, 3 GB"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: setup  ## make footage with known truth, curate it, train on it a little, and say where to look
	$(BIN)/understudy sample $(FOOTAGE) --group demo
	$(BIN)/understudy curate $(FOOTAGE) --recipe data_manifests/demo.yaml --out $(OUT) || test $$? -eq 1
	$(BIN)/understudy verify $(OUT)/dataset.json
	$(BIN)/understudy train $(OUT)/dataset.json --recipe data_manifests/demo.yaml --out $(TRAINED)
	@echo "The errors above are meant to be there: some of the footage is broken ($(FOOTAGE)/truth.csv says how)."
	@echo "Open $(OUT)/report.html. The shards are in $(OUT)/shards/, samples of the training in $(TRAINED)/*/samples/."

test: setup  ## the test suite
	$(BIN)/python -m pytest -n 3

test-slow: setup  ## what takes minutes: kills at random moments, long memory runs
	$(BIN)/python -m pytest -m slow

# Freed memory is kept for the next step: without these thresholds each tensor of some size is had from the kernel anew.
proof: setup  ## train on drawn puppets for up to 20 minutes, and print how well they follow sound and text
	MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456 \
	$(BIN)/python -m benchmarks.proof

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup  ## benchmark tables
	$(BIN)/python -m benchmarks.curate
	$(BIN)/python -m benchmarks.confusion
	$(BIN)/python -m benchmarks.backends

.PHONY: help setup demo test test-slow proof lint bench
