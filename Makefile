# Every target makes .venv by itself when it is missing or older than the files that define it.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint format bench bench-search reproduce clean

demo: $(READY)
	$(BIN)/scoremachine generate --data digits --machine els --count 16 --steps 20 --seed 0 --out runs/digits

test: lint
	$(BIN)/pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/table.py

bench-search: $(READY)
	$(BIN)/python benchmarks/search.py

reproduce: $(READY)
	$(BIN)/python docs/examples/reproduce.py --docs

clean:
	rm -rf .venv runs

# The stamp is written last: an interrupted set-up is started again from nothing.
$(READY): pyproject.toml constraints.txt
	rm -rf .venv
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("scoremachine needs Python 3.11 or newer; this is " + sys.version.split()[0] + ": set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)
