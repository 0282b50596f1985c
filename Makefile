# Needs Python 3.11+ and make; everything else is put into .venv.
PYTHON ?= python3
BIN := .venv/bin
# two processes of one thread each: on two cores half the time of one process of two
PARALLEL := -n 2 --dist worksteal
# a second opinion on Hessians and K-FAC in the tests; it asks for torchvision, which it does not use here and which pulls another torch
ORACLE := curvlinops-for-pytorch==3.0.1
WHEEL := $(or $(TMPDIR),/var/tmp)/mpsearch-wheel
export OMP_WAIT_POLICY = PASSIVE
export OMP_NUM_THREADS = 1

.PHONY: demo check test test-slow test-wheel test-alone test-versions test-export-peers notebooks lint docs clean

demo: .venv/ready
	$(BIN)/mpsearch demo

# what must pass before a change goes in: the gate runs this
check: lint test

test: .venv/ready
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow

notebooks: .venv/ready
	$(BIN)/python -m pytest tests/house/test_notebooks.py

# the exporters of tools that stay out of .venv, each in an environment of its own; the first time takes half an hour
test-export-peers:
	PYTHON=$(PYTHON) benchmarks/peers/test_exports.sh

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# the reference, as pages in site/
docs: .venv/ready
	$(BIN)/python docs/reference.py site

# torch first and pinned, so that no other package pulls a GPU build
.venv/ready: pyproject.toml requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps $(ORACLE)
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf .venv build dist site *.egg-info

# the tests against the built wheel, in an empty environment and another folder
test-wheel: .venv/ready
	rm -rf build dist $(WHEEL) && $(BIN)/python -m build --wheel --outdir dist . >/dev/null
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip install --quiet torch==2.13.0
	$(WHEEL)/bin/python -m pip install --quiet "$$(echo dist/*.whl)[test]"
	cp -r tests $(WHEEL)/tests
	cd $(WHEEL) && bin/python -m pytest -q -m "not slow" --import-mode=importlib $(PARALLEL) tests

# every public module and a search, with the wheel and what it declares and nothing else
test-alone:
	PYTHON=$(PYTHON) sh tests/versions.sh alone

# the suite with the newest versions that pyproject.toml allows, and with the lowest
test-versions:
	PYTHON=$(PYTHON) sh tests/versions.sh newest
	PYTHON=$(PYTHON) sh tests/versions.sh lowest
