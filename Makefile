# On a fresh machine: `make demo` runs the main job on real images, `make test` checks everything.

PYTHON ?= python3
BIN := .venv/bin
# torch first and alone: it is most of the download, and later steps then find it installed
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint bench install clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@echo "installing into .venv (a few minutes, about 7 GB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(INSTALL) torch torchvision
	@$(INSTALL) --editable '.[demo,dev]'
	@touch $@

demo: install
	$(BIN)/proctor demo

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python -m benchmarks.pipeline --json benchmarks/results/pipeline.json

clean:
	rm -rf .venv .proctor
