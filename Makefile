# Each target makes the virtual environment it needs; PYTHON and VENV choose another.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test smoke lint bench mutants drill fuzz docs clean

demo: $(VENV)/installed-demo
	$(BIN)/python scripts/train.py --config=configs/digits.py --workdir=runs/digits

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

smoke: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m smoke

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error --pythonpath $(BIN)/python

mutants: $(VENV)/installed-dev
	$(BIN)/python tests/mutants.py $(ONLY)

drill: $(VENV)/installed-dev
	$(BIN)/python tests/drill.py "$(ONLY)" $(or $(KILLS),30)

fuzz: $(VENV)/installed-dev
	RCM_FUZZ_SECONDS=$(or $(RCM_FUZZ_SECONDS),600) $(BIN)/python -m pytest tests/fuzz -p no:logging -k "$(ONLY)"

bench: $(VENV)/installed-dev
	$(BIN)/python -m kernels.bench

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# The packages of an extra of pyproject.toml.
$(VENV)/installed-%: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) runs site
