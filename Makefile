# Every target sets up what it needs. VENV=elsewhere puts the environments elsewhere.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY = 1

# The lower ends of the ranges in pyproject.toml
OLDEST = trl==1.15.0 transformers==5.10.1 accelerate==1.12.0 datasets==4.7.0 peft==0.18.0 math-verify==0.9.0 \
	matplotlib==3.9.0 openai==3.0.0 reasoning_gym==0.1.25

# Workers of pytest, which take over each other's tests: each has its own processes, and needs some 2 GiB
PARALLEL = --numprocesses=auto --maxprocesses=8 --dist=worksteal

.PHONY: quickstart demo test test-all test-oldest test-vllm lint docs wheel clean

quickstart: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py

# A real language model, in about an hour
demo: $(VENV)/.installed-demo
	$(BIN)/python examples/demo.py

# Without the tests marked as slow: six minutes on two cores
test: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL) --cov=trl_anytime --cov-report=term:skip-covered

# TRL 1.15 computes its LM head by a Triton kernel, which needs Triton's interpreter where there is no GPU. The examples,
# the tests marked as slow and those that are left out here train too long for it.
test-oldest: $(VENV)-oldest/.installed
	TRITON_INTERPRET=1 $(VENV)-oldest/bin/python -m pytest $(PARALLEL) --ignore=tests/project/test_examples.py \
		--ignore=tests/training/test_checkpoint.py --ignore=tests/training/test_faults.py \
		--ignore=tests/training/test_sharding.py -m "not slow"

# With a real vLLM engine, on the CPU
test-vllm: $(VENV)-vllm/.installed
	$(VENV)-vllm/bin/python -m pytest tests/vllm_engine

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site of docs/, in site/, with the extensions in tools/
docs: $(VENV)/.installed
	PYTHONPATH=tools NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python tools/check_site.py site

# The wheel, installed by itself; build/ could hold files that are no longer there
wheel: $(VENV)-wheel/.installed
	rm -rf build dist
	$(VENV)-wheel/bin/pip wheel --quiet --no-deps --wheel-dir dist .
	$(VENV)-wheel/bin/pip install --quiet --force-reinstall --no-deps dist/*.whl
	$(VENV)-wheel/bin/pip check
	$(VENV)-wheel/bin/python tools/measure_start.py

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-vllm $(VENV)-wheel build dist site outputs

# torch first and alone: as a dependency of another package, pip may pick another build
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

$(VENV)/.installed-demo: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)-oldest/.installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/pip install --quiet torch==2.13.0
	$(VENV)-oldest/bin/pip install --quiet $(OLDEST) pytest pytest-timeout pytest-xdist hypothesis markdown-it-py rich triton
	$(VENV)-oldest/bin/pip install --quiet --no-deps --editable .
	touch $@

$(VENV)-vllm/.installed: pyproject.toml Makefile tests/vllm_engine/requirements.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet torch==2.13.0
	$(VENV)-vllm/bin/pip install --quiet --no-deps --requirement tests/vllm_engine/requirements.txt
	$(VENV)-vllm/bin/pip install --quiet --no-deps --editable .
	touch $@

# Without extras
$(VENV)-wheel/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)-wheel/bin/pip install --quiet --constraint constraints.txt .
	touch $@
