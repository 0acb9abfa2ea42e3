# make example   installs everything into .venv, Caffe included, and writes example.png
# make test      installs what the tests take besides, and runs them
# make wheel     builds wheels/, from which `make` on other machines installs without a compiler:
#                make wheel PYCAFFE_ARCH=x86-64-v3, or PYCAFFE_CUDA=1 PYCAFFE_CUDA_ARCH=90 for such GPUs
# make gpu-check measures what the program does on this machine's GPU

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

WHEELS = wheels
WHEEL = $(firstword $(wildcard $(WHEELS)/pycaffe-*.whl))

.PHONY: install example test wheel gpu-check lint clean
install: $(VENV)/installed

$(VENV)/installed: requirements.txt $(shell find pycaffe -type f)
	$(if $(WHEEL),,pycaffe/system-packages.sh)
	$(PYTHON) -m venv $(VENV)
ifeq ($(WHEEL),)
	$(BIN)/pip install --quiet --upgrade pip
	@echo 'Installing the Python packages and building Caffe: a minute or two on two cores.'
	$(BIN)/pip install --quiet -r requirements.txt
else
	@echo 'Installing the Python packages, Caffe from $(WHEEL).'
	sed 's|^\./pycaffe|$(WHEEL)|' requirements.txt | $(BIN)/pip install --quiet --find-links $(WHEELS) -r /dev/stdin
endif
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

wheel:
	$(PYTHON) -m venv $(VENV)
	PYCAFFE_BUNDLE=ON $(BIN)/pip wheel --quiet --wheel-dir $(WHEELS) -r requirements.txt

gpu-check: $(VENV)/installed-test
	$(BIN)/python tests/gpu_check.py

clean:
	rm -rf $(VENV)
