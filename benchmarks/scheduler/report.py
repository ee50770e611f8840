"""The results as a table."""

from __future__ import annotations

from typing import Any

from benchmarks.common.machine import describe
from benchmarks.common.tables import format_spread, markdown_table
from benchmarks.scheduler.benchmark import ALONE, BESIDE, PREFIX, PREFIX_TOKENS, PROMPT_TOKENS, TEXT

HEADER = [
    "adapters",
    "running requests",
    "base model request",
    "+ beside adapters",
    "+ with a prefix",
    "+ with cached text",
    "step: + with prefixes",
    "step: + with cached text",
]


def report(found: dict[str, Any]) -> str:
    """Returns the report in Markdown."""
    rows = [
        [
            f"{cell['adapters']:,}",
            f"{cell['running']:,}",
            f"{cell['microseconds'][ALONE]['total']:.0f}",
            *(format_spread(cell["more"][kind]["total"], 0, sign="+") for kind in (BESIDE, PREFIX, TEXT)),
            *(format_spread(cell["more"][kind]["step"], 0, sign="+") for kind in (PREFIX, TEXT)),
        ]
        for cell in found["cells"]
    ]
    idle = "none" if not found["idle"] else ", ".join(found["idle"])
    return (
        f"Microseconds of CPU time in vLLM's front end and scheduler, without the model, for prompts of {PROMPT_TOKENS} tokens "
        "and blocks of 16: a base model request in vLLM without the plugin, and the additional cost, as median (quartiles), of "
        f"the same request beside adapters, with a prefix of {PREFIX_TOKENS} tokens, and with as much cached text. The last "
        "columns are the additional cost of one step of all running requests.\n\n"
        f"{markdown_table(HEADER, rows)}\n\n"
        f"Methods in the path of a request that the plugin patches in a vLLM without adapters: {idle}.\n\n"
        f"{describe(found['machine'])}"
    )
