# `make demo` and `make test` need a Python (3.10 to 3.13) and, for the fast CPU path, a C++ compiler; nothing else.
# nvcc on the PATH adds the CUDA module.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(wildcard csrc/*) setup.py pyproject.toml constraints.txt

.PHONY: demo test lint bench peers clean

demo: $(VENV)/.installed
	$(BIN)/less-fast demo

# As many workers as cores and memory allow (tests/conftest.py); PYTEST_ARGS="-n 0": all in one process.
test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

# At most ten minutes; the rows go to benchmarks/results/<device>. `benchmarks/tables.py --write` brings README in step.
bench: $(VENV)/.installed-test
	$(BIN)/python benchmarks/cpu.py

# Other libraries on the same work; each is installed into an environment of its own under .peers/.
peers: $(VENV)/.installed-test
	$(BIN)/python benchmarks/peers.py $(PEERS_ARGS)

# torch first and alone: with an exact version a CPU wheel that is at hand is taken, and nothing pulls another one.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(PIP_INSTALL) --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.torch $(SOURCES)
	$(PIP_INSTALL) --editable '.[test]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build *.egg-info less_fast/*.so
