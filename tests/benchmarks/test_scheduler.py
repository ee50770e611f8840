"""Requests take the right path through vLLM, and the report shows the measurements."""

import dataclasses
import json

import pytest
import wrapt

from benchmarks.common.docs_pages import markers
from benchmarks.common.machine import machine
from benchmarks.scheduler import benchmark as scheduler
from benchmarks.scheduler.__main__ import main
from benchmarks.scheduler.report import report

SETTINGS = scheduler.Settings(cells=((1, 1), (3, 2)), rounds=2, requests=3)


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    return scheduler.make_configs(tmp_path_factory.mktemp("configs"))


@pytest.fixture(scope="module")
def found(configs):
    cells = [scheduler.measure_cell(configs, *cell, SETTINGS) for cell in SETTINGS.cells]
    return {"machine": machine(), "settings": dataclasses.asdict(SETTINGS), "idle": [], "cells": cells}


def test_only_requests_with_a_prefix_run_behind_one(configs):
    from benchmarks.scheduler.request_path import BASE, Engine, FrontEnd, RequestPath, with_plugin, without_plugin

    lengths = {}
    for plugin, model, shared in (
        (True, scheduler.name_of(0), 0),
        (True, BASE, 0),
        (False, BASE, 0),
        (False, BASE, 64),
    ):
        kind = with_plugin if plugin else without_plugin
        engine = Engine(configs[plugin], kind)
        path = RequestPath(
            FrontEnd(configs[plugin], kind), engine, [model], prompt_tokens=40, shared_tokens=shared, running=3
        )
        path.measure(5)
        assert engine.num_running == 3
        lengths[plugin, model, shared] = [request.num_prompt_tokens for request in engine._scheduler.running]
        # The first request fills the blocks that the others share, if any.
        blocks = [engine._scheduler.kv_cache_manager.get_block_ids(f"request-{index:012d}")[0] for index in range(3)]
        assert blocks[0][:4] == blocks[1][:4] if model != BASE or shared else blocks[0][0] != blocks[1][0]
    base = [40, 41, 42]
    behind = [64 + length for length in base]
    assert list(lengths.values()) == [behind, base, base, behind]


def test_a_class_without_the_plugin_has_none_of_its_patches(configs):
    from vllm.v1.engine.input_processor import InputProcessor

    from benchmarks.scheduler.request_path import without_plugin

    assert isinstance(vars(InputProcessor)["process_inputs"], wrapt.FunctionWrapper)
    assert without_plugin(InputProcessor).process_inputs is InputProcessor.process_inputs.__wrapped__


def test_a_process_with_the_plugin_and_no_prefixes_runs_none_of_it():
    assert scheduler.patches_when_idle() == []


def test_every_cell_has_every_kind_and_stage(found):
    assert [(cell["adapters"], cell["running"]) for cell in found["cells"]] == list(SETTINGS.cells)
    for cell in found["cells"]:
        assert all(numbers["total"] > 0 and numbers["step"] > 0 for numbers in cell["microseconds"].values())
        bytes_of = cell["message bytes"]
        assert bytes_of[scheduler.BESIDE] == bytes_of[scheduler.ALONE] < bytes_of[scheduler.PREFIX]
        assert bytes_of[scheduler.ALONE] < bytes_of[scheduler.TEXT]


def test_the_report_has_a_row_per_cell(found, tmp_path):
    results, page = tmp_path / "scheduler.json", tmp_path / "overhead.md"
    results.write_text(json.dumps(found), encoding="utf-8")
    page.write_text("\n".join(markers("scheduler")), encoding="utf-8")
    main(["--report", "--results", str(results), "--page", str(page)])
    text = page.read_text(encoding="utf-8")
    assert report(found) in text
    rows = [line for line in report(found).splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows] == ["adapters", "---", "1", "3"]
    assert len({row.count("|") for row in rows}) == 1
