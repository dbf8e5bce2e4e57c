# Thin wrappers around public commands. The virtual environment is .venv; `make setup` makes it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready

# Waiting threads sleep instead of spinning: on a busy two-core machine small models train several times faster so.
export OMP_WAIT_POLICY ?= passive

.PHONY: help setup demo test test-all bench lint clean

help:
	@echo "make setup     make .venv and install the package with every extra"
	@echo "make demo      train the one-minute size on real text, save, reload, generate (under five minutes)"
	@echo "make test      lint and the default tests"
	@echo "make test-all  the slow tests as well, transformers' own model tests among them"
	@echo "make bench     every benchmark"
	@echo "make lint      ruff, basedpyright, import-linter"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or later is needed, {sys.executable} is {sys.version.split()[0]}; set PYTHON=...")'
	"$(PYTHON)" -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,quant,dev]'
	@touch $(READY)

demo: setup
	$(BIN)/k2 train training_recipes/debug_pretrain.yaml overwrite=true

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest -n 2

test-all: lint
	$(BIN)/pytest -m "slow or not slow"

bench: setup
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

clean:
	rm -rf .venv runs
