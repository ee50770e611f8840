"""Measures the CPU time that a prefix costs in vLLM's front end and scheduler, without the model.

    python -m benchmarks.scheduler             # a few minutes
    python -m benchmarks.scheduler --short     # under a minute
    python -m benchmarks.scheduler --report    # table from the results

Four kinds of requests take turns: to the base model in vLLM without the plugin (all its patches undone), to the base model of
an engine with adapters, with a prefix, and with a cached text as long as the prefix in vLLM without the plugin. Everything
except the forward pass is vLLM's own code. Times are CPU time of one thread; the cost of a kind is the median over the rounds
of its difference to the first kind.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from benchmarks.common.cli import make_parser, run
from benchmarks.common.machine import machine
from benchmarks.scheduler.benchmark import SHORT, Settings, measure, patches_when_idle
from benchmarks.scheduler.report import report


def main(arguments: list[str] | None = None) -> None:
    run(make_parser("scheduler", __doc__), "scheduler", measured, report, arguments)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    settings = SHORT if options.short else Settings()
    return {
        "machine": machine(),
        "settings": dataclasses.asdict(settings),
        "idle": patches_when_idle(),
        "cells": measure(settings),
    }


if __name__ == "__main__":
    main()
