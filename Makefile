# Everything runs in .venv, which this file makes. PYTHON and PIP_FLAGS may be given: make demo PYTHON=python3.12
PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
# Without --no-compile pip byte-compiles all of torch and transformers: a minute for modules that are never imported.
PIP = $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check --constraint constraints.txt $(PIP_FLAGS)

.DEFAULT_GOAL := help
.PHONY: help setup demo test soak figure lint clean

help:
	@echo "make demo    get the real model, export it with its heads, generate, measure: build/demo/"
	@echo "make test    run all tests"
	@echo "make soak    run tests/soak and tests/attacks in full, half an hour, and write benchmarks/results/soak.json"
	@echo "make figure  draw docs/speedup.svg from the committed reports of model sizes"
	@echo "make lint    ruff, mypy, import direction"
	@echo "make setup   install everything that developing needs into $(VENV)"
	@echo "make clean   remove $(VENV), build/ and caches"

setup: $(VENV)/dev.stamp

demo: $(VENV)/demo.stamp
	$(BIN)/medusa-deploy demo

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m "not model and not tensorrt and not slow"
	$(BIN)/python -m pytest -m "model or tensorrt or slow"

soak: $(VENV)/dev.stamp
	MEDUSA_DEPLOY_SOAK=full MEDUSA_DEPLOY_SOAK_REPORT=benchmarks/results/soak.json $(BIN)/python -m pytest tests/soak tests/attacks

# In the order of their size.
SIZES = smollm2-135m qwen2.5-coder-0.5b qwen2.5-coder-1.5b
figure: $(VENV)/dev.stamp
	$(BIN)/medusa-deploy figure $(foreach size,$(SIZES),$(sort $(wildcard benchmarks/results/$(size)-medusa-?-*.json))) \
		-o docs/speedup.svg --force

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# A system Python may lack ensurepip (Debian packs it apart): its own pip then fills the new environment.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: make … PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) 2>/dev/null || \
		{ $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip -qq --python $(VENV)/bin/python install pip; }

$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing what the demo needs into $(VENV): a few minutes"
	$(PIP) --editable '.[export]'
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing what the tests need into $(VENV): a few minutes"
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/demo.stamp
