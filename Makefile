# `make demo` and `make test` do all their own set-up: a virtual environment in .venv, the install, the run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: help venv demo test test-all check format docs picture clean

help:
	@echo "make demo      the whole path on built-in real data, a few minutes on a CPU; writes runs/demo/report.html"
	@echo "make test      the tests that need no GPU, no detectron2, no outside data and no minutes"
	@echo "make test-all  those too, kills and restarts among them (twenty minutes), each skipping with its reason"
	@echo "make check     lint and type-check"
	@echo "make docs      the documentation as a site, build/site/index.html"
	@echo "make picture   the picture of a report that README.md shows, from runs/demo/report.html (needs Chromium)"
	@echo "make venv      the virtual environment alone"

venv: $(READY)

$(READY): setup.py pyproject.toml
	@echo "== virtual environment in $(VENV), with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "moco-eval needs Python 3.10 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "== installing moco-eval and its packages (torch is large: minutes, several GB)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(READY)

demo: $(READY)
	@echo "== moco-eval demo: pretrain, kNN, linear, detection and a report, on built-in data"
	@$(BIN)/moco-eval demo --output runs/demo

test: $(READY)
	@echo "== tests that need no GPU, no detectron2, no outside data and no minutes"
	@$(BIN)/python -m pytest -n auto --dist loadfile

test-all: $(READY)
	@echo "== all tests; those whose needs are not met say what they miss"
	@$(BIN)/python -m pytest -m "" -rs

check: $(READY)
	@echo "== ruff and mypy"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(READY)
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

docs: $(VENV)/.docs-installed
	@echo "== the pages of docs/ as a site; every link and every docstring is checked"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict # not with --quiet, which hides the warnings from --strict too
	@echo "build/site/index.html is ready; its search needs a server: $(BIN)/python -m http.server -d build/site"

$(VENV)/.docs-installed: $(READY)
	@echo "== installing what makes the site and runs the tutorial"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@

picture: $(READY)
	@$(BIN)/python tools/report_picture.py runs/demo/report.html --output docs/report.png

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
