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
	@echo 'Installing the Python packages and building Caffe: a minute or two on two cores.'
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/installed-test: requirements-test.txt $(VENV)/installed
	$(BIN)/pip install --quiet -r requirements-test.txt
	touch $@

# Caffe for emulated GPUs, on which tests/test_gpu.py runs where there is no real one.
$(VENV)/cuda_on_cpu/built: $(VENV)/installed $(shell find tests/cuda_on_cpu -type f)
	@echo 'Building Caffe for emulated GPUs, for the tests: another minute or two.'
	tests/cuda_on_cpu/build.sh $(BIN)/python $(dir $@)
	touch $@

example: install
	PATH="$(abspath $(BIN)):$$PATH" examples/example.sh example.png

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint $(VENV)/cuda_on_cpu/built
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal tests

clean:
	rm -rf $(VENV)
