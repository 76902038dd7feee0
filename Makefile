# One environment, .venv, made on first use. A stamp file in it remembers what was installed from which
# pyproject.toml and constraints.txt, so that a second call installs nothing.

PYTHON ?= python3
PIP_FLAGS ?=
VENV ?= .venv
DEMO_OUT ?= demo
TEST_FLAGS ?=

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo install test page-test check soak clean

PIP := $(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)

# Two thread pools that spin at libgomp's barriers slow each other 10 to 30 times; here the parallel part is the tests.
TEST_ENV := IRET_ALL_EXTRAS=1 GOMP_SPINCOUNT=0 OMP_NUM_THREADS=1 PYTHONPATH="$(CURDIR)/tests$${PYTHONPATH:+:$$PYTHONPATH}"
PYTEST := $(TEST_ENV) $(VENV)/bin/python -m pytest
HOOK := --jaxtyping-packages=iret,beartype.beartype
WORKERS := -n logical --maxprocesses 4

help:
	@echo "make demo      install what the demo needs and run it: a table, and pictures in $(DEMO_OUT)/"
	@echo "make test      install what the tests need and run them (under 5 minutes); TEST_FLAGS='-k lifting' narrows them"
	@echo "make page-test drive the page in Chromium (needs npm and chromium)"
	@echo "make install   all extras and the developers' tools, into $(VENV)"
	@echo "make check     style, format and types"
	@echo "make soak      the long counts of kills, fuzz and load; output kept under results/"
	@echo "make clean     remove $(VENV), caches, build products, out/ and $(DEMO_OUT)/"
	@echo
	@echo "PYTHON=python3.12   another interpreter; constraints.txt wants 3.11 or newer (now: $(PYTHON))"
	@echo "PIP_FLAGS=...       more flags for pip. PyPI's torch for Linux brings CUDA (gigabytes); without an NVIDIA GPU:"
	@echo "                    make demo PIP_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu'"

demo: $(VENV)/.installed-demo
	GOMP_SPINCOUNT=$${GOMP_SPINCOUNT:-0} $(VENV)/bin/iret demo --out $(DEMO_OUT)

install: $(VENV)/.installed-dev

check: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The hook that executes the shapes in the signatures breaks compilation and export, hence a second pass without it, where a
# file's tests stay in one process: what one has traced, others check.
test: $(VENV)/.installed-dev
	$(PYTEST) $(WORKERS) --dist worksteal $(HOOK) -m "not graph and not soak" $(TEST_FLAGS)
	$(PYTEST) $(WORKERS) --dist loadfile -m "graph and not soak" $(TEST_FLAGS)

page-test: $(VENV)/.installed-dev tests/page/node_modules/.package-lock.json
	@command -v $${CHROMIUM:-/usr/bin/chromium} > /dev/null || { echo "Chromium is not installed: apt install chromium, or CHROMIUM=/path"; exit 1; }
	IRET_PAGE_TEST=1 $(PYTEST) tests/serve/test_page_driven.py -rP $(TEST_FLAGS)

tests/page/node_modules/.package-lock.json: tests/page/package-lock.json
	cd tests/page && npm ci --ignore-scripts --no-audit --no-fund

# Tests write their raw samples into $$IRET_SOAK_OUT. Paths of this machine are taken out of the log before it is kept.
soak: $(VENV)/.installed-dev
	@out=results/$$(date -u +%F)_soak_$$(uname -m)-$$(getconf _NPROCESSORS_ONLN)cpu_$$(git rev-parse --short HEAD 2>/dev/null || echo uncommitted); \
	if [ -e $$out ]; then out=$${out}_$$(date -u +%H%M%S); fi; \
	mkdir -p $$out; \
	$(TEST_ENV) $(VENV)/bin/python -c "import json; from iret import doctor; print(json.dumps(doctor.report(), indent=1))" > $$out/env.json; \
	verdict=passed; \
	IRET_SOAK_OUT="$(CURDIR)/$$out" $(PYTEST) --no-header -v --durations=0 -m soak $(TEST_FLAGS) 2>&1 \
		| sed -E 's#$(CURDIR)#.#g; s#/[^ :]*/lib/python3#lib/python3#g; s#/tmp/pytest-of-[^/]*#TMP#g' | tee $$out/soak.log || verdict=FAILED; \
	{ echo "# Soak"; echo; echo "Command: \`make soak\`. Verdict: $$verdict. What ran, and how long: \`soak.log\`."; } > $$out/README.md; \
	echo "$$verdict; kept in $$out"; [ $$verdict = passed ]

clean:
	rm -rf $(VENV) build dist out $(DEMO_OUT) .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- installing

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is $$($(PYTHON) --version 2>&1 | tail -n 1); constraints.txt wants Python 3.11 or newer. Try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make a virtual environment. On Debian or Ubuntu: apt install python3-venv; or name another: make PYTHON=..."; exit 1; }

$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[torch]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) 'pip>=25.1'
	$(PIP) -e '.[all]' --group dev
	@touch $@ $(VENV)/.installed-demo
