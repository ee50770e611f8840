"""The quality benchmark on a tiny random model: runs, resuming, and the report."""

import json

import pytest

from benchmarks.common.docs_pages import markers
from benchmarks.common.results import ResultsFile
from benchmarks.quality import methods
from benchmarks.quality.benchmark import Benchmark, Settings, Size
from benchmarks.quality.methods import METHODS
from benchmarks.quality.rates import COMPARED, TASKS, run_rates
from benchmarks.quality.report import variant_table, write_report
from helpers.tiny import tiny_model

TESTED = [method for method in METHODS if method.name in ("ours-mlp-exemplars", "stock-zero", "lora-r8")]


@pytest.fixture(scope="module")
def settings(subword_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama", vocab_size=300).save_pretrained(folder)
    subword_tokenizer.save_pretrained(folder)
    return Settings(
        model=str(folder),
        sizes=(Size(None, 2, 3), Size(8, 2, 2)),
        seeds=(0, 1),
        held_out_meanings=2,
        held_out_rows=3,
        search=Size(8, 1, 0),
    )


@pytest.fixture(scope="module")
def finished(settings, e2e, tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "quality.json"
    Benchmark(e2e, settings, path).run(TESTED)
    return path


def test_one_record_per_run(finished):
    records = json.loads(finished.read_text())["records"]
    kinds = [record["kind"] for record in records]
    assert (kinds.count("base"), kinds.count("search"), kinds.count("run")) == (1, 9, 12)
    run = next(record for record in records if record["kind"] == "run")
    assert run.keys() >= {"method", "options", "size", "seed", "learning_rate", "trained", "scores", "held_out_loss"}
    assert len(run["train_loss"]) == 2
    said = json.loads((finished.with_suffix("") / "lora-r8-all-1.json").read_text())
    assert len(said) == 3


def test_the_learning_rate_is_that_of_the_smallest_held_out_loss(finished):
    records = json.loads(finished.read_text())["records"]
    for method in TESTED:
        tried = [record for record in records if record["kind"] == "search" and record["method"] == method.name]
        assert [record["learning_rate"] for record in tried] == list(method.learning_rates)
        best = min(tried, key=lambda record: record["held_out_loss"])["learning_rate"]
        assert {r["learning_rate"] for r in records if r["kind"] == "run" and r["method"] == method.name} == {best}


def test_a_run_is_never_repeated_and_a_lost_one_is_made_again(finished, settings, e2e, tmp_path):
    content = json.loads(finished.read_text())
    lost = content["records"].pop()
    path = tmp_path / "quality.json"
    path.write_text(json.dumps(content))
    Benchmark(e2e, settings, path).run(TESTED)
    again = json.loads(path.read_text())["records"]
    assert again[:-1] == content["records"]
    assert {**again[-1], "cpu_seconds": None} == {**lost, "cpu_seconds": None}


def test_variants_change_one_choice_each(finished, settings, e2e, tmp_path, monkeypatch):
    monkeypatch.setattr(
        methods, "CHANGES", {"8 tokens": {"num_virtual_tokens": 8}, "GELU": {"reparam_activation": "gelu"}}
    )
    path = tmp_path / "quality.json"
    path.write_text(finished.read_text())
    Benchmark(e2e, settings, path).run_variants(METHODS[0])
    content = json.loads(path.read_text())
    first, second = content["records"][-2:]
    assert first["options"] == {**METHODS[0].options, "num_virtual_tokens": 8}
    assert second["options"] == {**METHODS[0].options, "reparam_activation": "gelu"}
    lines = variant_table(content, METHODS[0]).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["nothing", "8 tokens", "GELU"]


def test_results_of_other_settings_are_refused(finished, settings):
    with pytest.raises(ValueError, match="holds results of other settings"):
        ResultsFile(finished, {**settings.record(), "batch_size": 9})


def test_report_fills_the_page_and_saves_the_plot(finished, tmp_path):
    page, (begin, end) = tmp_path / "quality.md", markers("quality")
    page.write_text(f"# Title\n\n{begin}\nold\n{end}\n\nrest\n")
    text = write_report(finished, METHODS, page)
    assert page.read_text() == f"# Title\n\n{begin}\n{text}\n{end}\n\nrest\n"
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 3 + len(TESTED)
    assert lines[0].count("|") == lines[-1].count("|")
    assert "±" in lines[-1]
    assert finished.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_rates(finished, settings, e2e, tmp_path):
    path, page = tmp_path / "rates.json", tmp_path / "quality.md"
    run_rates(e2e, settings, path, rates=(5e-5, 2e-2))
    records = json.loads(path.read_text())["records"]
    assert len(records) == len(TASKS) * len(COMPARED) * 2
    losses = {(each["task"], each["label"], each["learning_rate"]): each["held_out_loss"] for each in records}
    for task in TASKS:
        # Without an MLP the lowest rate is 2e-2, to which 5e-5 is raised; as given, it is not.
        assert losses[task, "ours, flat", 5e-5] == losses[task, "ours, flat", 2e-2]
        assert losses[task, "ours, flat, as given", 5e-5] != losses[task, "ours, flat", 5e-5]
        assert losses[task, "ours, flat, as given", 2e-2] == losses[task, "ours, flat", 2e-2]
    assert losses["describe", "LoRA, rank 8", 2e-2] != losses["parse", "LoRA, rank 8", 2e-2]
    run_rates(e2e, settings, path, rates=(5e-5, 2e-2))
    assert json.loads(path.read_text())["records"] == records
    page.write_text("\n".join(markers("quality")))
    (tmp_path / "quality.json").write_text(finished.read_text())
    text = write_report(tmp_path / "quality.json", METHODS, page)
    assert text in page.read_text()
    assert "| learning rate | 5e-05 | 0.02 | farthest from its best at 2e-5 to 2e-4 |" in text
    assert path.with_suffix(".png").stat().st_size > 10_000
