#!/bin/sh
# benchmarks/gpu.sh [FOLDER]: everything on an NVIDIA GPU; results and plots go into FOLDER. Resumes if interrupted.
#
# Needs `pip install -e ".[serve,bench,dev]"`. Models have random weights; only the HTTP part downloads one.
set -eu
mkdir -p "${1:-gpu}"
results=$(cd "${1:-gpu}" && pwd)
cd "$(dirname "$0")/.."
status=0
python -m pytest -m gpu || status=$?
python -m benchmarks.gpu --results "$results/gpu.json" || status=$?
# A server needs the tokenizer of a real model.
python -m benchmarks.serving --transports http --requests 64 --concurrency 32 --output-tokens 128 --input-tokens 128 \
    --results "$results/serving-http.json" || status=$?
exit "$status"
