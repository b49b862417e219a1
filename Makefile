PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RECIPE ?= recipes/tiny.toml
TESTERS ?= 2

export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: run test check bench soak serve install install-dev clean

run: $(VENV)/.installed          ## install, then run the tiny recipe end to end on a plain CPU
	$(BIN)/isthmus run $(RECIPE)

serve: $(VENV)/.installed        ## chat with the model that `make run` made
	$(BIN)/isthmus serve runs/tiny

test: $(VENV)/.installed-dev     ## install, then run the tests
	$(BIN)/pytest --numprocesses $(TESTERS) --dist loadfile

check: $(VENV)/.installed-dev    ## style, types, import direction, rules
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/pytest tests/rules

bench: $(VENV)/.installed-dev    ## the measurements behind the numbers in the documents
	$(BIN)/python benchmarks/tiny_seeds.py
	$(BIN)/python benchmarks/rollout.py
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/train.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/scaling.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/gate.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/emulator.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/formats.py
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/deltas.py
	$(BIN)/python benchmarks/static_tier.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/live_tier.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/host_links.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/qualifier.py

soak: $(VENV)/.installed-dev     ## 10,000 random requests against a server, and nothing may be left of them
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build dist src/*.egg-info
