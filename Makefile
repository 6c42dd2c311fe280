# Every target works on a fresh machine that has only make, Python 3.11 and pip.
PYTHON ?= python3
PINS ?= constraints/current.txt
VENV ?= .venv

.PHONY: demo test test-oldest test-ui lint mutants constraints clean

# torch comes first and pinned, so that no other package picks a build with gigabytes of CUDA.
$(VENV)/.ready-%: pyproject.toml bases/pyproject.toml $(PINS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(PINS) torch==2.13.0
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(PINS) --editable ".$(EXTRA_$*)" $(BASES_$*)
	touch $@

# One process for each core; the tests of a file, which share models, stay together.
PYTEST := python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

EXTRA_dev := [dev]
EXTRA_ui := [dev,ui]
EXTRA_run :=

# The tests read all bases, the demo the one of the package.
BASES_dev := --editable ./bases
BASES_ui := $(BASES_dev)

demo: $(VENV)/.ready-run
	$(VENV)/bin/mixofshow demo

test: $(VENV)/.ready-dev lint
	$(VENV)/bin/$(PYTEST)

lint: $(VENV)/.ready-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/codespell src tests docs benchmarks examples *.md

# Not what hangs on no library, nor what runs in whole pages and benchmarks what other tests run piece by piece.
ONCE := architecture.py documentation.py examples.py figures.py schemas.py
OLDEST_WITHOUT := $(addprefix --ignore=tests/,laboratory mutation composlora $(addprefix test_,$(ONCE)))

test-oldest:
	$(MAKE) VENV=.venv-oldest PINS=constraints/oldest.txt .venv-oldest/.ready-dev
	.venv-oldest/bin/$(PYTEST) $(OLDEST_WITHOUT)

test-ui:
	$(MAKE) VENV=.venv-ui PINS=constraints/ui.txt .venv-ui/.ready-ui
	.venv-ui/bin/$(PYTEST) tests/ui

# What the tests do not notice: make mutants ARGS="--sample 100 --seed 1 src/diffusers_mixofshow/fusion".
mutants: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/mutation/run.py $(ARGS)

constraints:
	PYTHON=$(PYTHON) constraints/resolve.sh

clean:
	rm -rf .venv .venv-oldest .venv-ui build dist
