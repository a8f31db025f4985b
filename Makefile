# Everything goes through .venv, which is made once and again whenever pyproject.toml or constraints.txt change.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS ?= dev,serve,docs# CI has all: make check EXTRAS=dev,serve,docs,hub,spark
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test docs check format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## Create .venv and install the package with its development tools (PYTHON=python3.12 picks the Python)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.10 or newer is needed. Found no $(PYTHON). Install it, or name another: make venv PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed. $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make venv PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv and ensurepip modules are needed. $(PYTHON) has none. Install them (Debian, Ubuntu: apt-get install python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP) ## Simulate a town and walk the whole way: prepare, train, evaluate, export, recommend
	$(BIN)/twotower demo
	@echo "On a page: $(BIN)/twotower serve runs/town/bundle, then http://127.0.0.1:8000"

test: $(STAMP) ## Run the default tests (three minutes on two cores)
	$(BIN)/python -m pytest

docs: $(STAMP) ## Build the documentation site into build/site; warnings are errors
	$(BIN)/python docs/site/build.py

check: $(STAMP) ## What CI runs: formatting, lint, types, the site, and all tests, the slow ones included
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/site/build.py
	$(BIN)/python -m pytest -m ""

format: $(STAMP) ## Format the code and mend what the linter can mend
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean: ## Remove .venv, caches and build outputs
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
