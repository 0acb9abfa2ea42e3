# make example   installs everything into .venv, Caffe included, and writes example.png
# make test      installs the test tools and runs the tests; make quick runs those that take no time
# make wheel     builds wheels/, from which `make` installs on other machines without a compiler or network access:
#                make wheel PYCAFFE_ARCH=x86-64-v3; for one kind of GPU, add PYCAFFE_CUDA=1 PYCAFFE_CUDA_ARCH=90
# make gpu-check tests and times the program on this machine's GPU (make PYCAFFE_CUDA=1 gpu-check also builds for it)

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

WHEELS = wheels
# With PYCAFFE_CUDA=1, the CUDA libraries are installed too.
REQUIREMENTS = sed 's|^\./pycaffe|&$(if $(PYCAFFE_CUDA),[cuda])|' requirements.txt
WHEEL = $(firstword $(wildcard $(WHEELS)/pycaffe-*.whl))

.PHONY: install example quick test wheel gpu-check lint clean
install: $(VENV)/installed

$(VENV)/installed: requirements.txt $(or $(WHEEL),$(shell find pycaffe -type f))
	$(if $(WHEEL),,pycaffe/system-packages.sh)
	$(PYTHON) -m venv $(VENV)
ifeq ($(WHEEL),)
	$(BIN)/pip install --quiet --upgrade pip
	@echo 'Installing the Python packages and building Caffe: one to three minutes on two cores.'
	$(REQUIREMENTS) | ./with-progress.sh $(VENV)/build.log $(BIN)/pip install --verbose -r /dev/stdin
else
	@echo 'Installing everything from $(WHEELS)/.'
	$(BIN)/pip install --quiet --no-index --no-deps --force-reinstall $(WHEEL)
	$(REQUIREMENTS) | sed 's|^\./pycaffe|pycaffe|' | $(BIN)/pip install --quiet --no-index --find-links $(WHEELS) -r /dev/stdin
endif
	$(if $(PYCAFFE_CUDA),,rm -f $(VENV)/for-gpus)
	@# `import cnn_vis` works in this environment, also in the workers of a Dask cluster.
	@$(BIN)/python -c 'import sysconfig; open(sysconfig.get_path("purelib") + "/cnn_vis.pth", "w").write("$(CURDIR)\n")'
	touch $@

# With PYCAFFE_CUDA=1, a Caffe that was built for the CPU is rebuilt.
ifneq ($(PYCAFFE_CUDA),)
$(VENV)/installed: $(VENV)/for-gpus
$(VENV)/for-gpus:
	mkdir -p $(VENV)
	touch $@
endif

$(VENV)/installed-test: requirements-test.txt $(VENV)/installed
	$(BIN)/pip install --quiet -r requirements-test.txt
	touch $@

# Caffe for emulated GPUs, for tests/test_gpu.py on machines without a real one.
$(VENV)/cuda_on_cpu/built: $(VENV)/installed $(shell find tests/cuda_on_cpu -type f)
	@echo 'Building Caffe for emulated GPUs, for the tests: one to three minutes more.'
	tests/cuda_on_cpu/build.sh $(BIN)/python $(dir $@)
	touch $@

example: install
	PATH="$(abspath $(BIN)):$$PATH" examples/example.sh example.png
	@echo 'Next, with a photograph of your own:'
	@echo '    . $(BIN)/activate'
	@echo '    python cnn_vis.py --preset animals --image in.jpg'

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint $(VENV)/cuda_on_cpu/built
	$(BIN)/python -m pytest -n 4 --dist worksteal tests

quick: lint
	$(BIN)/python -m pytest -n 4 --dist worksteal -m 'not slow' tests

wheel:
	$(PYTHON) -m venv $(VENV)
	@echo 'Fetching the Python packages and building Caffe: two to three minutes on two cores.'
	rm -f $(WHEELS)/pycaffe-*.whl
	$(REQUIREMENTS) | PYCAFFE_BUNDLE=ON ./with-progress.sh $(VENV)/build.log \
	    $(BIN)/pip wheel --verbose --wheel-dir $(WHEELS) -r /dev/stdin

gpu-check: $(VENV)/installed-test $(if $(shell ldconfig -p 2>/dev/null | grep libcuda.so.1),,$(VENV)/cuda_on_cpu/built)
	$(BIN)/python tests/gpu_check.py

clean:
	rm -rf $(VENV)
