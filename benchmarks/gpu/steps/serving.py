"""The benchmark of serving (`python -m benchmarks.serving`) on one shape, and only those comparisons that fit into minutes.

    python -m benchmarks.gpu.steps.serving --shape 8B --comparisons lengths "LoRA, 64" --out serving-8B.json

Engines have random weights and run offline, with CUDA graphs. Each comparison is written when it is done.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common.results import ResultsFile
from benchmarks.common.shapes import SERVED_SHAPES, write_shape
from benchmarks.gpu.steps.arguments import parser_of
from benchmarks.serving.benchmark import Benchmark
from benchmarks.serving.comparisons import Settings

ON_GPU: dict[str, Any] = {
    **{"lengths": (64, 50, 1024), "mixes": (1, 8, 64), "loras": (1, 8, 64), "ranks": (8,)},
    **{"requests": 64, "mix_requests": 64, "input_tokens": 64, "output_tokens": 64},
    **{"base_starts": 1, "starts": 1, "rounds": 5, "slow_rounds": 5, "cache_gib": 12},
}
DRY: dict[str, Any] = {
    **{"lengths": (64,), "mixes": (1, 4), "loras": (4,), "ranks": (8,)},
    **{"requests": 4, "mix_requests": 4, "input_tokens": 8, "output_tokens": 4},
    **{"base_starts": 1, "starts": 1, "rounds": 2, "slow_rounds": 2, "cache_gib": 1, "dtype": "float32"},
}
# Of a shape of Llama, in a dry run.
SMALL: dict[str, Any] = {
    **{"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
}
# Shapes for which PEFT has no target modules of LoRA, or vLLM no slots for it.
WITHOUT_LORA = ("hybrid", "MLA")
# FlashMLA reads blocks of 64 tokens.
BLOCK_SIZES = {"MLA": 64}


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("serving", __doc__)
    parser.add_argument("--shape", choices=sorted(SERVED_SHAPES), default="8B")
    parser.add_argument("--comparisons", nargs="+", default=["lengths"], help="of benchmarks.serving")
    options = parser.parse_args(arguments)
    shape = "3B" if options.dry_run else options.shape
    changes = dict(DRY if options.dry_run else ON_GPU)
    if shape in WITHOUT_LORA:
        changes["loras"] = ()
    if shape in BLOCK_SIZES:
        changes["block_size"] = BLOCK_SIZES[shape]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_shape(folder / shape, shape, **(SMALL if options.dry_run else {}))
        settings = Settings(model=str(model), load_format="dummy", **changes)
        results = ResultsFile(options.out, settings.record())
        Benchmark(settings, results, folder, options.comparisons).run(["offline"])
    missing = [name for name in options.comparisons if not results.find(comparison=name)]
    if missing:
        print(f"There is no comparison {', '.join(missing)}.", file=sys.stderr)
    return len(missing)


if __name__ == "__main__":
    sys.exit(main())
