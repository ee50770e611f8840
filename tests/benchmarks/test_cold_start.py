"""The summary of measurements, and the report; without a server."""

import dataclasses
import json

import pytest

from benchmarks.cold_start.__main__ import main
from benchmarks.cold_start.benchmark import Settings, fill, server_options, summarize, summarize_folder
from benchmarks.cold_start.report import report
from benchmarks.common.docs_pages import markers
from benchmarks.common.machine import machine


@pytest.fixture(scope="module")
def found():
    starts = {
        number: [{"seconds": seconds, "bytes": size} for seconds, size in rounds]
        for number, rounds in {
            "0": [(30.0, 1000), (40.0, 1100), (50.0, 1050)],
            "10": [(31.0, 2000), (42.0, 2000), (51.0, 2000)],
            "1000": [(35.0, 9000), (46.0, 5_001_000), (54.0, 5_001_500)],
        }.items()
    }
    starts["1000"][0]["bytes"] = 5_002_000
    starts["folder"] = [{"seconds": seconds, "bytes": 1500} for seconds in (30.2, 40.1, 50.4)]
    requests, in_folder = (
        {
            kind: [{"seconds": value} for value in values]
            for kind, values in {"cold": [cold, 0.040, 0.035], "warm": [0.020, 0.028, 0.026]}.items()
        }
        for cold in (0.030, 0.037)
    )
    return {
        "machine": machine(),
        "settings": dataclasses.asdict(Settings(model="tiny")),
        **summarize(starts, requests, [0.011, 0.012, 0.019]),
        "folder": summarize_folder(starts, in_folder),
        "file bytes": 400_000,
        "bytes per resident adapter": 368_640,
    }


def test_servers_have_the_adapters_they_are_given(tmp_path):
    paths = {"a": tmp_path / "a", "b": tmp_path / "b"}
    assert server_options(paths)[-3:] == ["--prefix-adapter", f"a={tmp_path}/a", f"b={tmp_path}/b"]
    assert "--prefix-adapter" not in server_options({})


def test_a_folder_of_adapters_that_share_their_files(tmp_path):
    sources = [tmp_path / "a", tmp_path / "b"]
    for source in sources:
        source.mkdir()
        (source / "adapter_config.json").write_text(source.name)
    folder = fill(tmp_path / "folder", sources, 5)
    assert {path.name: (path / "adapter_config.json").read_text() for path in folder.iterdir()} == {
        **{"a": "a", "b": "b", "a-2": "a", "b-3": "b", "a-4": "a"}
    }


def test_starts_are_compared_within_rounds_and_memory_by_the_smallest(found):
    assert found["start"]["1000"]["more"]["median"] == 5
    assert found["start"]["10"]["more"]["median"] == 1
    assert found["bytes per registered adapter"] == 5000
    assert found["first request"]["more"]["median"] == pytest.approx(10)
    assert found["folder"]["start"]["more"]["median"] == pytest.approx(0.2)
    assert found["folder"]["first request"]["more"]["median"] == pytest.approx(12)
    assert found["load"]["median"] == pytest.approx(12)


def test_the_report_says_what_each_thing_costs(found, tmp_path):
    results, page = tmp_path / "cold_start.json", tmp_path / "overhead.md"
    results.write_text(json.dumps(found), encoding="utf-8")
    page.write_text("\n".join(markers("cold_start")), encoding="utf-8")
    main(["--report", "--results", str(results), "--page", str(page)])
    text = page.read_text(encoding="utf-8")
    assert report(found) in text
    assert "| more with 1,000 adapters | 5.0 s (4.5 to 5.5) |" in text
    assert "| more with 10,000 adapters in a folder | 0.2 s" in text
    assert "| first request to an adapter in the folder, more than the second | 12.0 ms" in text
    assert "| memory of a registered adapter | 4.9 KiB |" in text
    assert "| loading an adapter of 64 tokens at run time | 12.0 ms (11.5 to 15.5) |" in text
