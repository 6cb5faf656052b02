# Sets everything up in .venv on first use. PYTHON: the interpreter to build it from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# where a suitable torch is there already (a GPU machine's, say), it is used; elsewhere this one is installed, first and
# pinned, so that nothing pulls a larger build
TORCH ?= torch==2.13.0
HAS_TORCH := $(shell $(PYTHON) -c "import torch; v = tuple(map(int, torch.__version__.split('.')[:2])); print((2, 11) <= v < (2, 14))" 2>/dev/null)
SITE := $(if $(filter True,$(HAS_TORCH)),--system-site-packages)
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)

.PHONY: demo test lint bench sanitize clean

demo: $(VENV)/installed
	$(BIN)/python -m adam_ghost demo

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: $(VENV)/installed-dev
	$(BIN)/python -m bench throughput

sanitize: $(VENV)/installed-dev
	csrc/sanitize.sh $(BIN)/python

$(VENV)/base:
	$(PYTHON) -m venv $(SITE) $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q "setuptools>=77" wheel ninja
	touch $@

$(VENV)/installed: $(VENV)/base $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/base $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[dev]"
	touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) build dist *.egg-info adam_ghost/_C*.so
