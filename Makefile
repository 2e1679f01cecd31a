# Every target sets itself up: a virtual environment in .venv with the packages that constraints.txt pins.
# The set-up runs once and again only after constraints.txt or pyproject.toml has changed.
#
#   make quickstart        train a tiny chat model with WPO on this machine's CPU (about two minutes)
#   make test              every fast test, offline, on the CPU
#   make quality           what CI checks: lint, format, types, imports;  make style fixes the first two
#   make fuzz              random inputs to everything that reads what others wrote, for two minutes
#   make faults            kill every command at random times and compare the ends (ARGS='--kills 100 --seed 1')
#   make docs              the site, in docs/_build/html: warnings are errors, and every link must lead somewhere
#   make notebooks         run the notebooks of examples/notebooks (ARGS=--overwrite keeps their new outputs)
#   make certificate       run what docs/correctness.md claims, and write the page with the deviations that were seen
#   make nightly           what is too long for CI: 100 kills, an hour of fuzzing, the oldest and the newest versions
#   make study             when each method pays: six experiments, docs/study.md (ARGS='--quick', '--only wpo')
#   make bench             our padded path against TRL's DPOTrainer on this machine
#   make test-oldest       the fast tests on the oldest versions that pyproject.toml allows (an environment of its own)
#   make test-newest       the fast tests on the newest versions that the index has (an environment of its own)
#
# PYTHON picks the interpreter (3.11 to 3.14), TORCH_INDEX where pip looks for further torch builds.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/prefopt-ready
DOCS_READY := $(VENV)/prefopt-docs-ready

# A machine without an NVIDIA driver gets the CPU build of torch, a tenth of the size.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,$(if $(filter Linux,$(shell uname -s)),https://download.pytorch.org/whl/cpu))
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Nothing is downloaded at run time.
RUN := env HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
SOURCES := src tests scripts benchmarks examples docs

.DEFAULT_GOAL := help
.PHONY: help setup style quality test test-oldest test-newest quickstart docs notebooks fuzz faults certificate nightly study bench clean

help:
	@sed -n '/^#   make/s/^#   //p' Makefile

setup: $(READY)

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
		{ echo "prefopt: constraints.txt needs Python 3.11 to 3.14; name one, as in: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (once; a few minutes)"
	@$(PIP_INSTALL) $(if $(TORCH_INDEX),--retries 1 --extra-index-url $(TORCH_INDEX)) torch setuptools wheel
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

style: $(READY)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/python docs/file_tree.py
	$(RUN) $(BIN)/python docs/reading_list.py

quality: $(READY)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	PYTHONPATH=src $(BIN)/lint-imports
	$(BIN)/python docs/file_tree.py --check

test: $(READY)
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=10

# RESOLVE takes further words for uv, such as --override FILE for a build of torch that is at hand.
test-oldest test-newest: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(PYTHON) -m venv .venv-$(@:test-%=%)
	$(BIN)/uv pip install --quiet --python .venv-$(@:test-%=%) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		--resolution $(if $(findstring oldest,$@),lowest-direct,highest) --upgrade $(RESOLVE) --editable .
	$(BIN)/uv pip install --quiet --python .venv-$(@:test-%=%) $(RESOLVE) --editable '.[dev]'
	$(RUN) OMP_NUM_THREADS=1 .venv-$(@:test-%=%)/bin/python -m pytest -n 2 --dist worksteal

quickstart: $(READY)
	$(RUN) $(BIN)/python examples/quickstart/quickstart.py

# The site's and the notebooks' own packages, so that `make test` needs none of them.
$(DOCS_READY): $(READY)
	@$(PIP_INSTALL) --editable '.[docs]'
	@touch $@

docs: $(DOCS_READY)
	rm -rf docs/_build
	$(RUN) $(BIN)/python -m sphinx -b html -q --fail-on-warning --keep-going docs docs/_build/html
	$(BIN)/python docs/check_links.py docs/_build/html

NOTEBOOKS ?= $(wildcard examples/notebooks/*.ipynb)
notebooks: $(DOCS_READY)
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbmake --nbmake-timeout=600 --durations=0 $(ARGS) $(NOTEBOOKS)

fuzz: $(READY)
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz.py $(ARGS)

faults: $(READY)
	$(RUN) $(BIN)/python -m tests.faults $(ARGS)

# What is longer than CI may be: by hand, once a release.
certificate: $(READY)
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python docs/certificate.py

nightly: $(READY)
	$(MAKE) faults ARGS='--kills 100 --seed 1'
	$(MAKE) fuzz ARGS='--minutes 60'
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m nightly
	$(MAKE) test-oldest
	$(MAKE) test-newest

# Goes on where it was stopped.
study: $(READY)
	$(RUN) OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python -m benchmarks.study $(ARGS)

bench: $(READY)
	$(RUN) $(BIN)/python benchmarks/step_throughput.py --layouts padded $(ARGS)

# Removes what the targets leave behind; keeps .venv.
clean:
	rm -rf build dist outputs docs/_build docs/generated .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -print | xargs rm -rf
