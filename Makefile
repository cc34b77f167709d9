# From a fresh clone, with only Python >= 3.11 and make: `make demo` and `make test`.
# The virtual environment is made on first use, and again when pyproject.toml changes.

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
# Files are run side by side, in the order that tests/conftest.py gives them. Many tests wait for most of their time;
# but more at a time than this keep real jobs of several processes from making their limits on two cores.
PYTEST_WORKERS ?= 3
PYTEST := $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder
DEMO_ARGS ?=
BENCH_ARGS ?=
EXPLORE_WORLDS ?= 1000000
# XPK needs other versions of packages than the tests: it has an environment of its own. Finding versions of its many
# packages that fit takes pip minutes, and uv seconds.
XPK_VENV := .xpk

# A name on PATH may be a launcher without an interpreter behind it, so each candidate is run.
find_python = $(shell for python in python3.13 python3.12 python3.11 python3; do \
	if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1; \
	then echo $$python; break; fi; done)
PYTHON ?= $(find_python)

.DEFAULT_GOAL := help
.PHONY: help venv services xpk demo test long lint docs format explore survivors bench clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

venv: $(STAMP) ## the virtual environment, with everything for the demo and for development

$(STAMP): pyproject.toml
	@python='$(PYTHON)'; \
	if [ ! -x $(BIN)/python ]; then \
		if [ -z "$$python" ]; then \
			echo 'No Python from 3.11 to 3.13 on PATH; install one, or name it: make PYTHON=/path/to/python' >&2; \
			exit 1; \
		fi; \
		echo "making $(VENV) with $$($$python --version)"; \
		$$python -m venv $(VENV); \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,demo]'
	@touch $@

services: ## servers that tests use (Debian; needs root): without them those tests are skipped
	bash .ci/install

xpk: $(XPK_VENV)/.installed ## the real XPK, which tests run dry: without it those tests are skipped

$(XPK_VENV)/.installed: tests/deploy/xpk-requirements.txt
	@python='$(PYTHON)'; [ -x $(XPK_VENV)/bin/python ] || $$python -m venv $(XPK_VENV)
	$(XPK_VENV)/bin/python -I -m pip install --quiet --disable-pip-version-check uv
	$(XPK_VENV)/bin/uv pip install --quiet --python $(XPK_VENV)/bin/python --requirement $<
	@touch $@

demo: $(STAMP) ## train, lose a whole slice, come back (under 3 minutes)
	$(BIN)/emergency-ckpt demo $(DEMO_ARGS)

test: $(STAMP) ## all tests (options for pytest: PYTEST_ARGS="-x -k slots")
	$(PYTEST) $(PYTEST_ARGS)

long: $(STAMP) ## the cases that `make test` leaves out, because it shows one of their kind
	$(PYTEST) --long -m long $(PYTEST_ARGS)

lint: $(STAMP) ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --warnings

docs: $(STAMP) ## docs/flags.md, from the schema of the flags
	$(BIN)/emergency-ckpt flags --page > docs/flags.md

format: $(STAMP) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

explore: $(STAMP) ## the slot machine, far deeper than in `make test` (up to an hour; EXPLORE_WORLDS per case)
	EXPLORE_WORLDS=$(EXPLORE_WORLDS) $(BIN)/python -m pytest -s -k deep tests/core/test_slots_exhaustive.py

survivors: $(STAMP) ## every loss that a job of three slices of two hosts survives (about four minutes)
	SURVIVORS=all $(BIN)/python -m pytest -n0 -k every_loss tests/integration/test_survivors.py

bench: $(STAMP) ## measurements, beside Orbax and bare copies (some only: BENCH_ARGS="--only lost,fetch,plan")
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

clean: ## remove the virtual environment and all caches
	rm -rf $(VENV) $(XPK_VENV) build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
