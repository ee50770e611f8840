#!/bin/sh
# benchmarks/gpu.sh [FOLDER]: how fast prefixes are served and trained on an NVIDIA GPU; results and plots go into FOLDER.
#
# Needs `pip install -e ".[serve,bench]"`, and no model: shapes of 0.5B, 3B and 8B with random weights. Up to four engines share
# the GPU, of 10 % of its memory and 2 GiB of cache each. What is done already is not done again.
set -eu
mkdir -p "${1:-gpu}"
results=$(cd "${1:-gpu}" && pwd)
cd "$(dirname "$0")/.."
for shape in 0.5B 3B 8B; do
    python -m benchmarks.serving --shape "$shape" --transports offline --requests 64 --output-tokens 128 --input-tokens 128 \
        --mix-requests 256 --results "$results/serving-$shape.json"
    python -m benchmarks.training --shape "$shape" --results "$results/training-$shape.json"
done
# Over HTTP with a real model, whose tokenizer the server needs.
python -m benchmarks.serving --transports http --requests 64 --concurrency 32 --output-tokens 128 --input-tokens 128 \
    --results "$results/serving-http.json"
