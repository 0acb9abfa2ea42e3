# make example   installs everything into .venv, Caffe included, and writes example.png
# make test      installs what the tests take besides, and runs them

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: install example test lint clean
install: $(VENV)/installed

$(VENV)/installed: requirements.txt $(shell find pycaffe -type f)
	pycaffe/system-packages.sh
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	@echo 'Installing the Python packages and building Caffe: about three minutes on two cores.'
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/installed-test: requirements-test.txt $(VENV)/installed
	$(BIN)/pip install --quiet -r requirements-test.txt
	touch $@

example: install
	PATH="$(abspath $(BIN)):$$PATH" examples/example.sh example.png

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal tests

clean:
	rm -rf $(VENV)
