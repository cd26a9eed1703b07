# Every target sets up what it needs. VENV=elsewhere puts the environments elsewhere.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY = 1

# Workers of pytest, which take over each other's tests: each has its own processes, and needs some 2 GiB
PARALLEL = --numprocesses=auto --maxprocesses=8 --dist=worksteal

# Where every optional package is there, --no-skips fails a test that skips for another reason than the machine's hardware

.PHONY: quickstart demo test test-all coverage test-oldest test-vllm test-main gpu lint docs wheel pins clean

quickstart: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py

# A real language model, in about an hour
demo: $(VENV)/.installed-demo
	$(BIN)/python examples/demo.py

# Without the tests marked as slow: seven minutes on two slow cores
test: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL) --no-skips -m "not slow"

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL) --no-skips

# The same with the coverage, which costs CPU time
coverage: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL) --no-skips --cov=trl_anytime --cov-report=term:skip-covered

# TRL 1.15 computes its LM head by a Triton kernel, which needs Triton's interpreter where there is no GPU. The examples,
# the tests marked as slow and those that are left out here train too long for it. The demo and the study of its model
# need transformers 5.23. No such kernel runs on a pretended GPU (test_waits.py).
test-oldest: $(VENV)-oldest/.installed
	TRITON_INTERPRET=1 $(VENV)-oldest/bin/python -m pytest $(PARALLEL) --ignore=tests/project/test_examples.py \
		--ignore=tests/project/test_demo.py --ignore=tests/project/test_real_study.py --ignore=tests/modeling/test_waits.py \
		--ignore=tests/training/test_checkpoint.py --ignore=tests/training/test_faults.py \
		--ignore=tests/training/test_sharding.py -m "not slow"

# With a real vLLM engine, on the CPU, lm-eval as a client, and the demo's model
test-vllm: $(VENV)-vllm/.installed $(VENV)-lm-eval/.installed outputs/smollm2/config.json
	LM_EVAL=$(abspath $(VENV)-lm-eval/bin/lm_eval) SMOLLM2=$(abspath outputs/smollm2) \
		$(VENV)-vllm/bin/python -m pytest --no-skips tests/vllm_engine

# What needs a GPU, in at most nine minutes, with the environment that is there. GPU="--minutes 5" gives it options.
gpu:
	$(PYTHON) benchmarks/gpu.py $(GPU)

# TRL's newest release or pre-release, allowed by pyproject.toml or not: a line for each member that it moved, then the
# tests of what overrides it, and of training
test-main:
	$(PYTHON) -m venv --clear $(VENV)-main
	$(VENV)-main/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)-main/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(VENV)-main/bin/pip install --quiet --pre --upgrade trl
	$(VENV)-main/bin/pip list 2>/dev/null | grep -E "^(trl|transformers|torch) "
	moved=0; $(VENV)-main/bin/python tools/trl_members.py || moved=1; \
	$(VENV)-main/bin/python -m pytest $(PARALLEL) tests/test_trl_contract.py tests/test_brpo_trainer.py \
		--deselect tests/test_trl_contract.py::test_supported_versions && exit $$moved

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/deptry src
	$(BIN)/codespell

# The site of docs/, in site/, with the extensions in tools/
docs: $(VENV)/.installed
	PYTHONPATH=tools NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python tools/check_site.py site

# The wheel, installed by itself
wheel: $(VENV)-wheel/.installed
	rm -rf dist
	$(VENV)-wheel/bin/pip wheel --quiet --no-deps --wheel-dir dist .
	$(VENV)-wheel/bin/pip install --quiet --force-reinstall --no-deps dist/*.whl
	$(VENV)-wheel/bin/pip check
	$(VENV)-wheel/bin/python tools/measure_start.py

# The versions that these targets install, newest of the ranges in pyproject.toml
pins:
	$(PYTHON) -m venv $(VENV)-pins
	$(VENV)-pins/bin/pip install --quiet uv
	$(PYTHON) tools/pins.py newest $(VENV)-pins/bin/uv

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-vllm $(VENV)-lm-eval $(VENV)-wheel $(VENV)-pins $(VENV)-main dist site outputs

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
	$(VENV)-oldest/bin/pip install --quiet $$($(PYTHON) tools/pins.py lowest torch)
	$(VENV)-oldest/bin/pip install --quiet $$($(PYTHON) tools/pins.py lowest) pytest pytest-timeout pytest-xdist hypothesis markdown-it-py rich triton \
		hatchling hatch-fancy-pypi-readme
	$(VENV)-oldest/bin/pip install --quiet --no-deps --editable .
	touch $@

$(VENV)-vllm/.installed: pyproject.toml Makefile constraints.txt tests/vllm_engine/requirements.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)-vllm/bin/pip install --quiet --no-deps --requirement tests/vllm_engine/requirements.txt
	$(VENV)-vllm/bin/pip install --quiet --no-deps --editable .
	touch $@

outputs/smollm2/config.json: | $(VENV)/.installed-demo
	$(BIN)/python examples/smollm2.py outputs/smollm2

# Without torch, which it does not need to ask a server
$(VENV)-lm-eval/.installed: Makefile tests/vllm_engine/lm_eval.txt
	$(PYTHON) -m venv $(VENV)-lm-eval
	$(VENV)-lm-eval/bin/pip install --quiet --no-deps --requirement tests/vllm_engine/lm_eval.txt
	touch $@

# Without extras
$(VENV)-wheel/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)-wheel/bin/pip install --quiet --constraint constraints.txt .
	touch $@
