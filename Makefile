# Each target makes the virtual environment it needs; PYTHON and VENV choose another.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test smoke lint bench mutants clean

demo: $(VENV)/installed
	$(BIN)/python scripts/train.py --config=configs/digits.py --workdir=runs/digits

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

smoke: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m smoke

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error --pythonpath $(BIN)/python

mutants: $(VENV)/installed
	$(BIN)/python tests/mutants.py $(ONLY)

bench: $(VENV)/installed
	$(BIN)/python -m kernels.bench

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs
