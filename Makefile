# Everything goes through .venv, which is made once and updated whenever pyproject.toml or constraints.txt change.
# `make demo` installs what a user needs; every other target adds the development tools.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS ?= dev,docs# CI has all: make check EXTRAS=dev,docs,spark
USER := .venv/.installed
DEV := .venv/.installed-dev
BIOME := npx --yes @biomejs/biome@2.6.8
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile# a worker takes whole files: their fixtures are made once
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv demo wheelhouse test coverage mutants js clients docs check format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(DEV) ## Create .venv and install the package with its development tools (PYTHON=python3.12 picks the Python)

$(USER): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or newer is needed. Found no $(PYTHON). Install it, or name another: make venv PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed. $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make venv PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv and ensurepip modules are needed. $(PYTHON) has none. Install them (Debian, Ubuntu: apt-get install python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(INSTALL) -e '.[train,serve,client,datasets]'
	@touch $@

$(DEV): $(USER)
	$(INSTALL) -e '.[$(EXTRAS)]'
	@touch $@

demo: $(USER) ## Simulate a town and walk the whole way, into runs/town: prepare, train, evaluate, export, recommend
	$(BIN)/twotower demo --overwrite
	@echo "(twotower is $(BIN)/twotower; serve shows a page at http://127.0.0.1:8000)"

wheelhouse: $(DEV) ## Fill wheelhouse/ with what a Kaggle notebook without internet lacks: upload it as a dataset
	$(BIN)/python deploy/wheelhouse.py wheelhouse

test: $(DEV) ## Run the default tests, in several processes
	$(PYTEST)

coverage: $(DEV) ## Run all tests and report which lines and branches they reach, in other processes too
	$(PYTEST) -m "" --cov --cov-report=term:skip-covered

mutants: $(DEV) ## Change the core in many small ways, and count what its tests find (half an hour; not part of check)
	$(BIN)/python benchmarks/mutants.py

js: ## Check format and lint of the page's scripts (needs Node.js)
	@if command -v npx >/dev/null; then $(BIOME) ci --colors=off --error-on-warnings .; \
	elif [ "$$CI" = true ]; then echo "npx is missing. CI checks the page's scripts with it. Install Node.js." >&2; exit 1; \
	else echo "Skipped the page's scripts: npx is missing. Install Node.js to check them."; fi

clients: $(DEV) ## Write what is generated from the server's code: docs/openapi.json and the types of the clients (Node.js for one)
	$(BIN)/python clients/generate.py

docs: $(DEV) ## Build the documentation site into build/site; warnings are errors
	$(BIN)/python docs/site/build.py

check: $(DEV) js ## What CI runs: formatting, lint, types, scripts, the site, and all tests, the slow ones included
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/site/build.py
	$(PYTEST) -m ""

format: $(DEV) ## Format the code and mend what the linter can mend
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	@if command -v npx >/dev/null; then $(BIOME) check --colors=off --write .; fi

clean: ## Remove .venv, caches and build outputs
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
