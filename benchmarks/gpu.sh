#!/bin/sh
# benchmarks/gpu.sh [FOLDER]: the serving and training benchmarks on an NVIDIA GPU; results and plots go into FOLDER.
#
# Needs `pip install -e ".[serve,bench]"`. Models of 0.5B, 3B and 8B have random weights; only the HTTP part downloads a model. Up
# to four engines share the GPU, each with 10 % of its memory and 2 GiB of cache. Resumes if interrupted.
set -eu
mkdir -p "${1:-gpu}"
results=$(cd "${1:-gpu}" && pwd)
cd "$(dirname "$0")/.."
for shape in 0.5B 3B 8B; do
    python -m benchmarks.serving --shape "$shape" --transports offline --requests 64 --output-tokens 128 --input-tokens 128 \
        --mix-requests 256 --results "$results/serving-$shape.json"
    python -m benchmarks.training --shape "$shape" --results "$results/training-$shape.json"
done
# A server needs the tokenizer of a real model.
python -m benchmarks.serving --transports http --requests 64 --concurrency 32 --output-tokens 128 --input-tokens 128 \
    --results "$results/serving-http.json"
