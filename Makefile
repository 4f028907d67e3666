# `make demo` sets up an environment in .venv and tells stories; `make test` runs every check; `make lab` opens the book.
#
#   PYTHON=python3.12    which Python makes the environment (3.11 or newer)
#   TORCH_INDEX=auto     where torch comes from: auto (PyTorch's CPU index where there is no GPU), none (pip's own), or a URL
#   WORKERS=2            how many tests run at a time
#   ARGS="..."           more arguments for demo, lab (as root: --allow-root), bench, test, soak

PYTHON      ?= python3
VENV        ?= .venv
TORCH       ?= torch==2.13.0
TORCH_INDEX ?= auto
WORKERS     ?= 2
ARGS        ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SAY := @printf 'minillm: %s\n'

# Tests are the same everywhere: on the CPU, offline, one thread for each worker.
TEST_ENV := MINILLM_DEVICE=cpu HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false JUPYTER_PREFER_ENV_PATH=1 \
            OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST   := $(TEST_ENV) $(BIN)/python -m pytest
NBVAL    := --nbval --nbval-current-env --nbval-cell-timeout=120

.DEFAULT_GOAL := help
.PHONY: help setup dev demo doctor test test-browser lint lab notebooks bench gpu soak clean distclean

help:
	@echo "make demo       set up .venv (once) and tell stories with the bundled model"
	@echo "make test       lint, types, tests, and every notebook"
	@echo "make lab        open the book in JupyterLab"
	@echo "make setup      only set up .venv"
	@echo "make doctor     what works on this machine, what does not, and what to do"
	@echo "make notebooks  run every notebook and store its outputs"
	@echo "make lint       only ruff and mypy"
	@echo "make bench      measure, beside transformers"
	@echo "make gpu        add FlashInfer (NVIDIA GPU, nvcc)"
	@echo "make soak       the tests that run for minutes"
	@echo "make test-browser  the book in JupyterLab in Chromium, light and dark; pictures in browser-report"
	@echo "make clean      remove caches; distclean: .venv, too"

# --- the environment: a stamp file for each stage, so that a second run starts at once ---------------------------------

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	  "minillm needs Python 3.11 or newer, and this is %d.%d. Try: make PYTHON=python3.12 ..." % v[:2])'
	$(SAY) 'making $(VENV) with $(PYTHON)'
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.made constraints.txt
	$(SAY) 'installing $(TORCH) (200 MB as the CPU build; a few minutes)'
	@options="$$($(BIN)/python tools/torch_index.py $(TORCH_INDEX))" && $(PIP) install -q $$options '$(TORCH)'
	@touch $@

$(VENV)/.base: $(VENV)/.torch pyproject.toml
	$(SAY) 'installing minillm and what it needs'
	@$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(SAY) 'installing JupyterLab and the test tools'
	@$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(VENV)/.base
dev: $(VENV)/.dev

# --- what one runs -----------------------------------------------------------------------------------------------------

demo: setup
	@$(BIN)/python -m minillm demo $(ARGS)

doctor: setup
	@$(BIN)/python -m minillm doctor

bench: setup
	@$(BIN)/python -m minillm bench --peer transformers $(ARGS)

lab: dev
	@$(BIN)/python -m jupyter lab notebooks/00_start_here.ipynb $(ARGS)

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(PYTEST) -q -n $(WORKERS) --dist loadscope $(NBVAL) tests notebooks $(ARGS)

# Not part of `make test`: needs a Chromium on this machine (Debian: apt-get install chromium), and takes minutes.
test-browser: dev
	@$(PIP) install -q -c constraints.txt playwright
	$(TEST_ENV) $(BIN)/python tests/browser/run_chapters.py $(ARGS)

notebooks: dev
	@$(TEST_ENV) $(BIN)/python -m minillm.lab.notebooks $(ARGS)

soak: dev
	$(PYTEST) -m soak tests $(ARGS)

# Where torch came as the CPU build, pip's own index has the CUDA build of the same version.
gpu: setup
	@$(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)' || \
	  { printf 'minillm: %s\n' 'replacing the CPU build of torch (several gigabytes)'; \
	    $(PIP) install -q --force-reinstall '$(TORCH)'; }
	$(SAY) 'installing FlashInfer (1.2 GB with what it needs)'
	@$(PIP) install -q -c constraints.txt -e '.[gpu]'
	@$(BIN)/python -m minillm doctor

clean:
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
