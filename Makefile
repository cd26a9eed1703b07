# Every target sets up what it needs. VENV=elsewhere puts the environment elsewhere.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: quickstart test lint clean

quickstart: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) outputs

# torch first and alone: as a dependency of another package, pip would pick a build with CUDA
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
