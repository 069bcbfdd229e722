# `make` alone lists what there is. `PYTHON=python3.12 make test` chooses the Python that .venv is made with.
SHELL := /bin/bash
.DEFAULT_GOAL := help
ROWS ?= ../shared/data/gsm8k_train.jsonl
.PHONY: help setup quickstart test test-slow test-faults test-browser bench gpu-check lab docs pages readme clean-notebooks sync check clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# A Python that was asked for by name replaces a .venv made with another version
ifneq ($(origin PYTHON),file)
minor = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
ifneq ($(call minor,$(PYTHON)),$(call minor,$(BIN)/python))
$(shell rm -f $(READY) $(BIN)/python)
endif
endif

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## Make .venv and install the package and its tools in it

quickstart: $(READY) ## Fine-tune the embedded model from data to chat
	$(BIN)/sage-finetune quickstart code

test: $(READY) ## Run every notebook and every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

test-slow: $(READY) ## Run the property tests on 10,000 cases each, and what takes too long for `make test`
	SAGE_EXAMPLES=10000 $(BIN)/python -m pytest tests/test_data.py tests/rows/test_sources.py tests/rows/test_files_formats.py \
	  tests/runs/test_codebase.py -k any
	$(BIN)/python -m pytest -m slow --ignore=tests/faults

FAULTS := .pytest_cache/faults.jsonl
test-faults: $(READY) ## Plant faults at moments of writing in every command, and write their table (SAGE_FAULTS=every: at all)
	mkdir -p $(dir $(FAULTS))
	SAGE_FAULTS_LOG=$(FAULTS) $(BIN)/python -m pytest -m slow tests/faults; status=$$?; \
	  $(BIN)/python tests/faults/table.py $(FAULTS) benchmarks/README.md; exit $$status

test-browser: $(READY) ## Run the tutorials in a real JupyterLab in Chromium, and use their form, dashboard, chat and slider (installs what is missing)
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
	  if [ "$$(id -u)" = 0 ]; then apt-get update -q && apt-get install -y -q chromium; else echo "Chromium is missing: sudo apt-get install chromium"; exit 1; fi; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt playwright
	$(BIN)/python -m pytest tests/browser

gpu-check: $(READY) ## See on a card what a CPU cannot show, in 8 minutes: one JSON line a check
	$(BIN)/python benchmarks/gpu_check.py

bench: $(READY) ## Measure: data and training against TRL, a million rows, the head (ROWS=FILE.jsonl names the rows)
	$(BIN)/python benchmarks/prepare.py $(ROWS)
	$(BIN)/python benchmarks/million_rows.py $(ROWS) 250,000 1,000,000
	$(BIN)/python benchmarks/head.py
	$(BIN)/python benchmarks/train.py $(ROWS)
	$(BIN)/python benchmarks/dashboard.py

lab: $(READY) ## Open the notebooks in JupyterLab
	$(BIN)/python -m jupyterlab --notebook-dir=nbs

readme: $(READY) ## Write README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

clean-notebooks: $(READY) ## Strip from the notebooks what is no source: counters, clocks, editor state
	$(BIN)/nbdev-clean

sync: $(READY) ## After editing notebooks: export the modules, clean the notebooks, write the maps and README.md
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python tools/map.py
	$(BIN)/python tools/readme.py

pages: $(READY) ## Check that every notebook makes a documentation page (needs no Quarto)
	$(BIN)/python tools/pages.py

docs: pages ## Build the documentation site in _docs (needs Quarto)
	@command -v quarto >/dev/null || { echo "The site is built by Quarto, which is not on PATH. Get it from" \
	  "https://quarto.org/docs/get-started/ (or run $(BIN)/nbdev-install-quarto, which asks for root), then: make docs"; exit 1; }
	$(BIN)/nbdev-docs

check: ## Everything a change must pass before it is merged (what CI runs)
	.ci/run

clean: ## Remove .venv and what was built; notebooks, runs and models stay
	rm -rf $(VENV) build dist _docs _proc *.egg-info .pytest_cache

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys' 2>/dev/null || { echo "$(PYTHON) was not found. Name a Python from 3.10 on: PYTHON=python3.12 make $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3,10))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), too old: Python 3.10 or newer is needed. Name one: PYTHON=python3.12 make $(MAKECMDGOALS)"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "Making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
