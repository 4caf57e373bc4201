# kvmesh: `make` lists the targets.
#
# Everything runs in .venv, which is made on first use and updated when
# pyproject.toml or constraints.txt change. All paths are relative, so that the
# name of the checkout's folder may contain spaces.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# Python 3.11 or newer to make the environment with: the first one found.
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo "$$name" && break; done)
# A package index with smaller torch builds, e.g. on a machine without a GPU:
#   make venv TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Further arguments, e.g. make test ARGS='-k layering', make serve ARGS='--port 9001'.
ARGS ?=

# What `make image` builds: cpu or cuda.
TARGET ?= cpu
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

PY := .venv/bin/python
STAMP := .venv/.installed

.PHONY: help venv hooks demo serve test test-fast test-slow test-ray coverage mutants lint format protos sdk chart image \
	dashboards graph bench clean distclean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

venv: $(STAMP) ## Make the environment: .venv with pinned dependencies

$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x $(PY) ]; then \
		if [ -z '$(PYTHON)' ]; then \
			echo 'kvmesh needs Python 3.11 or newer, but none was found.' >&2; \
			echo 'On Debian: apt install python3 python3-venv. Or: make venv PYTHON=/path/to/python3.11' >&2; \
			exit 1; \
		fi; \
		echo 'Making .venv with $(PYTHON)'; \
		'$(PYTHON)' -m venv .venv || { \
			rm -rf .venv; \
			echo 'The venv module does not work here. On Debian: apt install python3-venv' >&2; \
			exit 1; \
		}; \
	fi
	@echo 'Installing kvmesh and its dependencies (torch, Ray, transformers; takes minutes the first time)'
	$(PY) -m pip install $(if $(TORCH_INDEX),--extra-index-url '$(TORCH_INDEX)') \
		-c constraints.txt -e '.[serve,plot,dev]'
	@# For one example, where Ray Serve does not find it: see `data` in pyproject.toml.
	$(PY) -m pip install --quiet --upgrade --no-deps --target .venv/data -c constraints.txt pandas pyarrow
	@touch $@

hooks: $(STAMP) ## Let git run lint and the repository's rules before each commit
	.venv/bin/pre-commit install

demo: $(STAMP) ## Start a local cluster, ask the model a question, show the cost, stop
	.venv/bin/kvmesh demo $(ARGS)

serve: $(STAMP) ## Serve until Ctrl-C
	@exec .venv/bin/kvmesh serve $(ARGS)

test: $(STAMP) ## Run all tests, or those of ARGS
ifneq ($(strip $(ARGS)),)
	$(PY) -m pytest $(ARGS)
else
	$(MAKE) coverage
	$(MAKE) test-slow test-ray
endif

# Tests are compiled once and not in each run, also where the shell says otherwise.
export PYTHONDONTWRITEBYTECODE :=
# In a process for each core, up to 4: each loads for itself what it tests.
SPREAD := -n logical --maxprocesses 4
BY_FILE := $(SPREAD) --dist loadscope
test-fast: $(STAMP) ## Run the fast tests: no Ray and no slow ones
	$(PY) -m pytest -m 'not (ray or slow)' $(or $(ARGS),$(BY_FILE))

coverage: $(STAMP) ## Run the fast tests, and fail if they execute too little of the code
	$(PY) -m pytest -m 'not (ray or slow)' $(BY_FILE) --cov --cov-report=

test-slow: $(STAMP) ## Run the slow tests that need no Ray: interpreted kernels, whole models
	$(PY) -m pytest -m 'slow and not ray' $(or $(ARGS),$(SPREAD) --dist worksteal)

test-ray: $(STAMP) ## Run the tests that start a Ray cluster, two at a time: they wait a lot
	$(PY) -m pytest -m ray $(or $(ARGS),-n 2 --dist loadgroup)

mutants: $(STAMP) ## Which faults do tests not notice? ARGS='scheduler' for one module (minutes)
	$(PY) -m tests.mutants $(ARGS)

lint: $(STAMP) ## Run ruff and mypy, and check that what is generated is current
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) protos/generate.py --check
	$(PY) protos/reference.py --check
	$(PY) helm/generate.py --check
	$(PY) -m dashboards --check

format: $(STAMP) ## Sort imports and format
	$(PY) -m ruff check --select I --fix .
	$(PY) -m ruff format .

protos: $(STAMP) ## Regenerate what follows from the wire contract
	$(PY) protos/generate.py
	$(PY) protos/reference.py

image: ## Build the image: TARGET=cpu or cuda, ARGS='--network=host --build-arg BASE=…'
	docker build --file docker/Dockerfile --target $(TARGET) --build-arg VERSION=$(VERSION) \
		--tag kvmesh:$(VERSION)$(patsubst -cpu,,-$(TARGET)) $(ARGS) .

chart: $(STAMP) ## Write the chart's schema and table of values
	$(PY) helm/generate.py

sdk: $(STAMP) ## Write the SDK's blocking client and its methods with options
	$(PY) -I client/generate.py

dashboards: $(STAMP) ## Write dashboards, alerts and docs/metrics.md
	$(PY) -m dashboards

graph: $(STAMP) ## Draw the import graph in CONTRIBUTING.md
	$(PY) -m tests.repo.graph

bench: $(STAMP) ## Run the benchmarks, which report ratios within one run
	$(PY) -m benchmarks $(ARGS)

clean: ## Remove caches and build products
	rm -rf build dist *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove the environment as well
	rm -rf .venv
