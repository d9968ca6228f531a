# Everything happens in .venv; nothing outside this directory is touched but pip's cache.
#
#   make demo        install, build the shipped checkpoint for a CPU, run it, prove it
#   make test        install, lint, types, import floors, all tests but the long ones
#   make test-long   the same with the long ones
#   make lint        lint, types and import floors alone
#   make engines     build the engines of artifacts/engines anew: some minutes, no GPU
#   make coverage    the tests once more, with a table of lines that none of them runs
#
# PYTHON chooses the interpreter. PIP_ARGS goes to every pip install; for the CPU build of torch,
# which is a tenth of the default's size:
#
#   make demo PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'

PIP_ARGS ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c constraints.txt

.PHONY: demo test test-long lint engines coverage clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/python demo/run.py

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) -m "not long"

test-long: lint
	$(BIN)/python -m pytest -n $(WORKERS)

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# Without weights: `lingc bind` or `lingc run --checkpoint` brings those of any matching checkpoint.
FLASH := artifacts/checkpoints/ling-2.6-flash
ENGINE = $(BIN)/lingc build $(FLASH) --weights external --overwrite

engines: $(VENV)/.test
	$(ENGINE) --precision fp8 --target h20,h20-3e,h200-sxm -o artifacts/engines/ling-2.6-flash-fp8.ling
	$(ENGINE) --precision int4-fp8 --target h20,h100-sxm -o artifacts/engines/ling-2.6-flash-int4-fp8.ling

coverage: $(VENV)/.test
	$(BIN)/coverage run -m pytest -m "not long"
	$(BIN)/coverage report --skip-covered

clean:
	rm -rf $(VENV) build dist lingc.egg-info

# A stamp is newer than what it was installed from, so the second run installs nothing.
$(VENV)/.demo: $(VENV)/.made pyproject.toml constraints.txt
	$(INSTALL) -e '.[build,onnx]'
	@touch $@

$(VENV)/.test: $(VENV)/.made pyproject.toml constraints.txt
	$(INSTALL) -e '.[build,onnx,cuda,dev]'
	@$(INSTALL) -e '.[tensorrt]' \
	  || echo "TensorRT for RTX cannot be installed here: its tests are skipped, and say so" >&2
	@touch $@ $(VENV)/.demo

# The first interpreter that starts, is new enough and can make environments. Version managers put
# names on the path that do not start, so each is tried.
$(VENV)/.made:
	@for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3); do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	      2>/dev/null; then \
	    echo "making $(VENV) with $$($$python --version) ($$(command -v $$python))"; \
	    $$python -m venv $(VENV) && touch $@ && exit 0; \
	    exit 1; \
	  fi; \
	done; \
	echo "lingc needs Python 3.11 or newer with its venv module; found none$(if $(PYTHON), in $(PYTHON))." >&2; \
	echo "Debian, Ubuntu: apt install python3-venv; elsewhere: make PYTHON=/path/to/python3" >&2; \
	exit 1
