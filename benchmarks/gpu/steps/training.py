"""The benchmark of training (`python -m benchmarks.training`) on one shape, without its report.

python -m benchmarks.gpu.steps.training --shape 3B --out training-3B.json
python -m benchmarks.gpu.steps.training --shape 0.5B --compiled --out training-0.5B-compiled.json
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.common.shapes import SHAPES
from benchmarks.gpu.steps.arguments import device_of, parser_of
from benchmarks.training.benchmark import Benchmark, Settings
from benchmarks.training.steps import METHODS

ON_GPU: dict[str, Any] = {
    **{"batches": (4,), "prefixes": (16, 128, 1024), "length": 512, "rounds": 5, "dtype": "bfloat16"},
}
DRY: dict[str, Any] = {"layers": 1, "batches": (1,), "prefixes": (16,), "length": 16, "rounds": 1, "dtype": "float32"}
# Each is compiled by itself, for each length of the prefix.
COMPILED_METHODS = tuple(name for name in METHODS if "checkpointing" not in name and name != "LoRA, rank 16")
COMPILED_PREFIXES = (128,)


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("training", __doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="3B")
    parser.add_argument("--attention", help="transformers' attn_implementation, such as flash_attention_2")
    parser.add_argument("--compiled", action="store_true", help="run the models by torch.compile")
    options = parser.parse_args(arguments)
    changes = dict(DRY if options.dry_run else ON_GPU)
    if options.compiled:
        changes["prefixes"] = changes["prefixes"][:1] if options.dry_run else COMPILED_PREFIXES
        let_every_method_compile()
    settings = Settings(
        model=options.shape,
        device=device_of(options),
        attention=options.attention,
        compiled=options.compiled,
        **changes,
    )
    Benchmark(settings, options.out, COMPILED_METHODS if options.compiled else tuple(METHODS)).run()
    return 0


def let_every_method_compile() -> None:
    """Lets all methods share the code of one model class, for which torch compiles eight variants by default.

    What it cannot compile of a method runs as it is, and does not end the benchmark.
    """
    from torch._dynamo import config

    config.recompile_limit = 64
    config.suppress_errors = True


if __name__ == "__main__":
    sys.exit(main())
