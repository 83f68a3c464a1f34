# Everything runs in one virtual environment: the active one, otherwise .venv, which is created here.
PYTHON ?= python3
VENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.fastgen-$(firstword $(shell echo $(CURDIR) | cksum))
RUN := runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: help install build demo test lint bench gpu quality clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-10s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## install fastgen (editable) with everything it needs
$(INSTALLED): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[test,bench,demo]"
	touch $@

build: $(INSTALLED) ## compile the native ops
	$(BIN)/fastgen build

demo: build ## train a DCGAN on handwritten digits and show its samples
	$(BIN)/fastgen train dcgan --data digits --out $(RUN)

test: build ## run the tests
	$(BIN)/python -m pytest -n 2

lint: $(INSTALLED) ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

bench: build ## measure fastgen, PyTorch's own ops and other peers
	$(BIN)/python -m pytest benchmarks -p no:xdist --benchmark-json=benchmarks/results/cpu.json
	$(BIN)/python -m benchmarks.report benchmarks/results/cpu.json > benchmarks/results/cpu.md
	$(BIN)/python -m benchmarks.plot benchmarks/results/cpu.json benchmarks/results/latency.png

quality: build ## train each system and measure its samples; ROW=name for one row
	$(BIN)/python -m benchmarks.quality $(if $(ROW),--row $(ROW)) $(if $(SEED),--seed $(SEED))

gpu: $(INSTALLED) ## compare the GPU kernels with PyTorch and measure them; without a GPU, run the checks that need none
	$(BIN)/python -m benchmarks.gpu benchmarks/results

clean: ## remove what was built here (but neither .venv nor runs)
	rm -rf build dist *.egg-info fastgen/_native_*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
