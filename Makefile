PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test lint fix docs clean

demo: $(VENV)/.run ## compile a trained model and print the proof
	$(BIN)/mopt demo

test: lint ## everything that must hold before a merge
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests

lint: $(VENV)/.dev ## ruff on the sources, mypy on a built tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/typecheck.py

fix: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first and by its exact version, so that no dependency pulls in another build of it.
$(VENV)/.run: $(VENV)/.made setup.cfg pyproject.toml constraints.txt
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) install --constraint constraints.txt --editable ".[dev]"
	touch $@

docs: $(VENV)/.docs ## the site, in site/
	$(BIN)/python -m mkdocs build --strict

$(VENV)/.docs: $(VENV)/.run
	$(PIP) install --constraint constraints.txt --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis out
