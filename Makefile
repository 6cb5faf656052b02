# Sets everything up in .venv on first use. PYTHON: the interpreter to build it from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# where a suitable torch is there already (a GPU machine's, say), it is used; elsewhere this one is installed, first and
# pinned, so that nothing pulls a larger build
TORCH ?= torch==2.13.0
OLDEST := $(shell sed -n 's/.*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)
HAS_TORCH := $(shell $(PYTHON) -c "import sys, torch; there, oldest = (tuple(map(int, x.split('.')[:2])) \
  for x in (torch.__version__, sys.argv[1])); print(there >= oldest)" $(OLDEST) 2>/dev/null)
SITE := $(if $(filter True,$(HAS_TORCH)),--system-site-packages)
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)

.PHONY: demo test lint docs wheels bench evidence evidence-quick sanitize clean

demo: $(VENV)/installed
	$(BIN)/python -m adam_ghost demo

# a process per core, each with one thread
test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --durations 25

lint: $(VENV)/installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# the site, in build/site; a link that leads nowhere, or a docstring that does not fit its function, fails
docs: $(VENV)/installed-docs
	$(BIN)/mkdocs build --strict

# one file per platform, for all versions of Python and torch, in dist
wheels: $(VENV)/base
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .
	@ls dist/*.whl

bench: $(VENV)/installed-dev
	$(BIN)/python -m bench throughput

# measures every claim again, under 90 minutes on two cores, and writes docs/evidence.md; goes on where it was cut off
evidence: $(VENV)/installed-evidence
	OMP_NUM_THREADS=1 $(BIN)/python -m bench evidence

evidence-quick: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m bench evidence --quick

sanitize: $(VENV)/installed-dev
	csrc/sanitize.sh $(BIN)/python

$(VENV)/base:
	$(PYTHON) -m venv $(SITE) $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q "setuptools>=77" wheel ninja
	touch $@

$(VENV)/installed: $(VENV)/base $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[ledger]"
	touch $@

$(VENV)/installed-dev: $(VENV)/base $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[dev]"
	touch $(VENV)/installed $@

$(VENV)/installed-docs: $(VENV)/base $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[docs]"
	touch $@

# pictures, and the peers beside which scores are measured: without what they require but do not use here, a torchvision that
# need not fit this torch
$(VENV)/installed-evidence: $(VENV)/installed-dev
	$(BIN)/python -m pip install -q "matplotlib>=3.9" einconv einops opt_einsum tqdm scipy
	$(BIN)/python -m pip install -q --no-deps kronfluence==1.0.1 traker==0.3.2 opacus==1.6.0
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info adam_ghost/_C*.so
