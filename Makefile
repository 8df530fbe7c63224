# make demo | test | faults | check | docs | bench | gpu | large | wheel | clean. Needs Python >= 3.11, make and a C++ compiler.
PYTHON ?= python3
VENV   ?= .venv

BIN   := $(VENV)/bin
STAMP := $(VENV)/.set-up
PIP   := $(BIN)/python -m pip --disable-pip-version-check
TYPES := build/types

.PHONY: setup demo test faults check lint tree types docs bench gpu-setup gpu large wheel clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

# torch comes first: setup.py compiles against it.
$(STAMP): pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pnlac-fast needs Python 3.11 or newer: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch==2.13.0 setuptools ninja
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[test,docs]'
	@cd / && '$(abspath $(BIN))/python' -c 'from pnlac_fast.ops import engines; cpp = engines()["cpp"]; cpp == "available" or print(f"WARNING: {cpp}: make -B setup")'
	@touch $@

demo: $(STAMP)
	$(BIN)/pnlac-fast demo --overwrite

test: $(STAMP)
	$(BIN)/python -m pytest

# What takes long: the store's fault tests at length, 200 kills each with one and two workers, every call of a disk, every
# file, 100 forgeries; and a fine-tune that inductor compiles.
faults: $(STAMP)
	PNLAC_LONG_TESTS=1 $(BIN)/python -m pytest tests/store/test_kill.py tests/store/test_faults.py tests/store/test_damage.py tests/store/test_machine.py
	PNLAC_LONG_TESTS=1 $(BIN)/python -m pytest tests/unit/test_trainer_processes.py -k inductor

check: lint types test

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# Tools that read the source know no package-dir, so they get the tree as it is installed: store/ inside pnlac_fast/.
tree:
	@rm -rf $(TYPES) && mkdir -p $(TYPES)
	@cp -Rp pnlac_fast $(TYPES)/pnlac_fast && cp -Rp store $(TYPES)/pnlac_fast/store

types: $(STAMP) tree
	cd $(TYPES) && '$(abspath $(BIN))/mypy' --config-file '$(CURDIR)/pyproject.toml' --cache-dir '$(CURDIR)/.mypy_cache' -p pnlac_fast

# Whatever is not right is an error: a page, a link, a name in the reference.
docs: $(STAMP) tree
	@rm -rf build/help && mkdir -p build/help
	@for verb in $$(sed -n 's|.*"build/help/\(.*\).txt".*|\1|p' docs/reference/commands.md); do \
	  COLUMNS=86 $(BIN)/pnlac-fast $$verb --help > build/help/$$verb.txt || exit; done
	$(BIN)/zensical build --clean --strict

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks

# Needs a torch with CUDA, and takes the one that $(PYTHON) has: its own environment, .venv-gpu, sees those packages and
# gets only what is missing. The file name of the result is that of the device.
GPU := .venv-gpu/bin/python
gpu-setup:
	@$(PYTHON) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null || \
	  { echo "This needs a CUDA device and a torch that sees it: make $(MAKECMDGOALS) PYTHON=/path/to/python"; exit 1; }
	test -x $(GPU) || $(PYTHON) -m venv --system-site-packages .venv-gpu
	$(PYTHON) -c 'import torch; print("torch==" + torch.__version__)' > .venv-gpu/torch.txt
	$(GPU) -m pip --disable-pip-version-check install --quiet --constraint .venv-gpu/torch.txt setuptools ninja
	$(GPU) -m pip --disable-pip-version-check install --quiet --constraint .venv-gpu/torch.txt --no-build-isolation --editable '.[test]'

gpu: gpu-setup
	$(GPU) -m pytest -q tests/gpu
	$(GPU) benchmarks/gpu.py

# The study on a base of 53 M parameters, which is trained on the GPU first; stopped, the same command goes on.
large: gpu-setup
	.venv-gpu/bin/pnlac-fast study --size large --seeds 0 --jobs 8 --out pnlac-large

# The wheel is built from the source distribution, so that it holds nothing that the latter lacks.
# Both are checked as an index would, and for files that do not belong there.
wheel: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

clean:
	rm -rf $(VENV) .venv-gpu build dist *.egg-info pnlac_fast/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
