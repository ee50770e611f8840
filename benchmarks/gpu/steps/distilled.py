"""How fast a distilled prefix is served, against its full context: as text, as cached text, and as its exact prefix.

    python -m benchmarks.gpu.steps.distilled --shape 8B --out distilled-8B.json

What prefixes hold does not affect speed, so none is distilled: the measurement is that of `benchmarks.distillation`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common.machine import machine
from benchmarks.common.shapes import SERVED_SHAPES, write_shape
from benchmarks.distillation.settings import Settings
from benchmarks.distillation.tasks import speed
from benchmarks.gpu.steps.arguments import device_of, parser_of
from benchmarks.gpu.steps.serving import SMALL

ON_GPU: dict[str, Any] = {
    **{"context_tokens": 4096, "prefix_tokens": 256, "requests": 32, "input_tokens": 64, "output_tokens": 64},
    **{"speed_rounds": 5, "cache_gib": 24, "block_size": 16, "speed_dtype": "bfloat16"},
}
DRY: dict[str, Any] = {
    **{"context_tokens": 96, "prefix_tokens": 32, "requests": 2, "input_tokens": 8, "output_tokens": 4},
    **{"speed_rounds": 1, "cache_gib": 1, "block_size": 32, "speed_dtype": "float32"},
}


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("distilled", __doc__)
    parser.add_argument("--shape", choices=sorted(SERVED_SHAPES), default="8B")
    options = parser.parse_args(arguments)
    shape = "3B" if options.dry_run else options.shape
    with tempfile.TemporaryDirectory() as name:
        model = write_shape(Path(name) / shape, shape, **(SMALL if options.dry_run else {}))
        changes = DRY if options.dry_run else ON_GPU
        settings = Settings(model=str(model), **changes)
        dtype = getattr(torch, settings.speed_dtype)
        with torch.device(device_of(options)):
            base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=dtype)
        measured = speed.measure(settings, base, load_format="dummy")
    record = {"task": speed.TASK, "measurements": measured, "machine": machine()}
    content = {"settings": {"model": shape, **changes}, "records": [record]}
    options.out.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
