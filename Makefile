# Two commands for a fresh machine, on Windows in Git Bash; each does its own set-up in .venv:
#   make demo    one short video from a prompt, with the bundled small model
#   make test    lint, types and every test
#
# Variables: PYTHON (interpreter for the virtual environment), TORCH (what pip installs as PyTorch),
#            PROMPT and DEMO (prompt and file of the demo), PYTEST_ARGS (more arguments for pytest).

ifeq ($(OS),Windows_NT)
PYTHON      ?= python
SCRIPTS     := Scripts
else
PYTHON      ?= python3
SCRIPTS     := bin
endif
TORCH       ?= torch==2.13.0
PROMPT      ?= a red circle moves right over a blue background
DEMO        ?= demo.mp4
PYTEST_ARGS ?=

VENV := .venv
BIN  := $(VENV)/$(SCRIPTS)
PIP  := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint types pytest bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/standalone.stamp
	@$(BIN)/allegro generate "$(PROMPT)" --output "$(DEMO)" --force
	@echo "Your video: $(abspath $(DEMO))"

test: lint types pytest

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .

types: $(VENV)/test.stamp
	$(BIN)/mypy

# The pytest script, not `python -m pytest`: the latter puts this folder on sys.path, where nodes/ would hide ComfyUI's nodes.py.
pytest: $(VENV)/test.stamp
	$(BIN)/pytest tests -n logical --maxprocesses 4 $(PYTEST_ARGS)

bench: $(VENV)/test.stamp
	$(BIN)/python tests/bench/bench_core.py --write docs/benchmarks.md
	$(BIN)/python tests/bench/bench_vae.py --write docs/benchmarks.md
	$(BIN)/python tests/bench/bench_vfi.py --write docs/benchmarks.md
	$(BIN)/python tests/bench/bench_scale.py --write docs/benchmarks.md

clean:
	rm -rf $(VENV) build *.egg-info

# PyTorch first and alone, so that the build asked for is kept whatever the other packages would like.
$(VENV)/torch.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is older than Python 3.10: set PYTHON=/path/to/a/newer/python"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "Could not create $(VENV): on Debian and Ubuntu install python3-venv first"; exit 1; }
	@echo "Installing $(TORCH) into $(VENV) (once)"
	@$(PIP) "$(TORCH)" numpy
	@touch $@

$(VENV)/standalone.stamp: $(VENV)/torch.stamp pyproject.toml
	@echo "Installing the command line's packages into $(VENV)"
	@$(PIP) --editable ".[standalone]"
	@touch $@

$(VENV)/test.stamp: $(VENV)/standalone.stamp
	@echo "Installing the test packages into $(VENV)"
	@$(PIP) --editable ".[standalone,test]"
	@touch $@
