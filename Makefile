# Needs Python 3.11+ and make; everything else is put into .venv.
PYTHON ?= python3
BIN := .venv/bin
export OMP_WAIT_POLICY = PASSIVE
export OMP_NUM_THREADS = 2

.PHONY: demo test test-slow lint clean

demo: .venv/ready
	$(BIN)/mpsearch demo

test: .venv/ready
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch first and pinned, so that no other package pulls a GPU build
.venv/ready: pyproject.toml requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
