"""The GPU benchmark: its plan, how steps are run and resumed, the report; and a dry run, which is whole in `make soak`."""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.common.docs_pages import markers
from benchmarks.common.results import ResultsFile
from benchmarks.common.shapes import name_architecture
from benchmarks.distillation.tasks import speed
from benchmarks.gpu import run_steps
from benchmarks.gpu.__main__ import NO_GPU, main
from benchmarks.gpu.goals import goals
from benchmarks.gpu.models import MODELS, config_of, write_model
from benchmarks.gpu.plan import DISTILLED, KERNELS, PARITY, SERVING, TRAINING, Step, plan
from benchmarks.gpu.reference import Reference
from benchmarks.gpu.report import NO_RESULTS, write_report
from benchmarks.gpu.steps.distilled import ON_GPU as DISTILLED_SETTINGS
from benchmarks.gpu.steps.serving import ON_GPU as SERVING_SETTINGS
from benchmarks.serving.comparisons import Settings, comparisons
from benchmarks.training.steps import METHODS, STOCK_FLAT

STEPS = [*plan(dry_run=False), *plan(dry_run=True)]
MACHINE = {"accelerator": "A GPU", "cores": 2, "cpu": "A", "versions": {"torch": "2"}, "revision": "abc"}


def test_names_of_steps_differ() -> None:
    for dry_run in (False, True):
        names = [step.name for step in plan(dry_run)]
        assert len(set(names)) == len(names)


def test_only_the_dry_run_needs_no_gpu() -> None:
    assert all(step.on_cpu for step in plan(dry_run=True))
    assert not any(step.on_cpu for step in plan(dry_run=False))
    assert {step.kind for step in plan(dry_run=True)} == {PARITY, SERVING, DISTILLED, TRAINING}


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_arguments_of_steps_are_valid(step: Step, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step_main = import_module(f"benchmarks.gpu.steps.{step.kind}").main
    # `--help` ends a step before it does anything, but after the arguments in front of it were checked.
    with pytest.raises(SystemExit) as ended:
        step_main([*step.arguments, "--out", str(tmp_path / "out"), "--dry-run", "--help"])
    assert ended.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("step", [step for step in STEPS if step.kind == SERVING], ids=lambda step: step.name)
def test_comparisons_of_steps_exist(step: Step) -> None:
    wanted = step.arguments[step.arguments.index("--comparisons") + 1 :]
    known = {one.name for one in comparisons(Settings("tiny", **SERVING_SETTINGS), "offline")}
    assert set(wanted) <= known | {"LoRA, 4"}


@pytest.mark.parametrize("name", MODELS)
def test_models_can_be_made_and_name_their_class(name: str) -> None:
    config = config_of(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    name_architecture(config)
    assert config.architectures == [type(model).__name__]


@pytest.mark.parametrize("name", ["llama", "hybrid", "gated delta", "MLA"])
def test_the_reference_scores_what_it_generates(name: str, tmp_path: Path) -> None:
    """Hybrids and latents are checked on a GPU only; their models and references are not."""
    lengths = {"p5": 5, "p9": 9}
    base = write_model(tmp_path, name, torch.float32, "cpu", lengths)
    reference = Reference(base, {prefix: tmp_path / prefix for prefix in lengths}, torch.float32, "cpu")
    prompt, scores = [7, 8, 9, 10], {}
    for prefix in (None, *lengths):
        answer = reference.generate(prefix, prompt, 6)
        assert len(answer) == 6
        found = scores[prefix] = reference.scores(prefix, prompt, answer)
        torch.testing.assert_close(found.of_answer, found.of_best, atol=1e-4, rtol=0)
    firsts = {round(float(found.of_best[0]), 3) for found in scores.values()}
    assert len(firsts) == 3


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["--results", str(tmp_path / "gpu.json")]) == 2
    assert NO_GPU in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


def test_steps_are_listed_and_found_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert all(step.name in shown for step in plan(dry_run=False))
    with pytest.raises(SystemExit, match="There is no step 'kernel'"):
        main(["--steps", "kernel"])


def test_steps_run_once_and_failed_ones_again(tmp_path: Path) -> None:
    # The first module does nothing and ends well. There is no second one, and no third package.
    steps = [Step("well", "arguments"), Step("ill", "nothing"), Step("lacks", "arguments", needs="no_such_package")]
    results = ResultsFile(tmp_path / "gpu.json", {"dry_run": True})
    assert not run_steps.run_steps(steps, results, dry_run=True)
    found = {record["step"]: record for record in results.records}
    assert [found[name]["status"] for name in ("well", "ill", "lacks")] == [
        run_steps.DONE,
        run_steps.FAILED,
        run_steps.CANNOT,
    ]
    assert found["lacks"]["reason"] == "no_such_package is not installed"
    log = (tmp_path / "gpu.log").read_text(encoding="utf-8")
    assert "=== ill: exit status 1" in log
    assert not run_steps.run_steps(steps, results, dry_run=True)
    assert [record["step"] for record in results.records] == ["well", "ill", "lacks"]
    again = (tmp_path / "gpu.log").read_text(encoding="utf-8").removeprefix(log)
    assert "=== ill" in again
    assert "=== well" not in again


def test_without_time_a_step_is_not_begun(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path / "gpu.json", {"dry_run": True})
    assert not run_steps.run_steps([Step("well", "arguments")], results, dry_run=True, budget=1)
    assert results.records[0]["status"] == run_steps.NO_TIME


def test_a_step_that_takes_too_long_ends_with_its_children(tmp_path: Path) -> None:
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', %r]); time.sleep(60)"
    child = f"import pathlib, time; time.sleep(2.5); pathlib.Path({str(tmp_path / 'alive')!r}).touch()"
    start = time.monotonic()
    assert run_steps._wait([sys.executable, "-c", code % child], {}, 1.0, tmp_path / "said") is None
    assert time.monotonic() - start < 2.5
    time.sleep(max(0, start + 4 - time.monotonic()))
    assert not (tmp_path / "alive").exists()


def test_variables_of_the_user_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step("one", PARITY, environment={"TRITON_F32_DEFAULT": "ieee"})
    assert run_steps.environment(step, dry_run=False)["TRITON_F32_DEFAULT"] == "ieee"
    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32")
    assert run_steps.environment(step, dry_run=False)["TRITON_F32_DEFAULT"] == "tf32"


def parity(dtype: str, equal: int, ours: float) -> dict[str, Any]:
    def group(equal: int, mean: float) -> dict[str, Any]:
        spread = {"mean": mean, "p99": mean, "max": 2 * mean}
        return {"answers": 48, "equal": equal, "tokens": 9, "best": 9, "engine": spread, "transformers": spread}

    return {"dtype": dtype, "ok": True, "groups": {"base": group(12, 0.01), "prefixes": group(equal, ours)}}


def serving() -> dict[str, Any]:
    settings = Settings("8B", **SERVING_SETTINGS)
    records = []
    for comparison in comparisons(settings, "offline"):
        rates = {
            one.name: 100.0 if one.name.startswith(("prefix", "64 prefixes")) else 50.0 for one in comparison.candidates
        }
        measured = {
            name: [{"tokens_per_second": rate, "ttft_p50": 1 / rate, "itl_p50": 0.01}] * 3
            for name, rate in rates.items()
        }
        records.append(
            {"transport": "offline", "comparison": comparison.name, "machine": MACHINE, "measurements": measured}
        )
    return {"settings": settings.record(), "records": records}


def training() -> dict[str, Any]:
    spread = {"median": 1.25, "quartiles": [1.0, 1.5], "rounds": 3}
    method = {
        "saved": 2**21,
        "peak": 2**22,
        "ratios": dict.fromkeys(("limit", STOCK_FLAT, "PEFT prefix tuning, MLP"), spread),
    }
    cell = {"batch": 4, "prefix": 128, "methods": dict.fromkeys(METHODS, method), "machine": MACHINE}
    settings = {"model": "3B", "layers": None, "dtype": "bfloat16", "device": "cuda", "length": 512, "rounds": 3}
    return {"settings": {**settings, "compiled": True}, "records": [cell]}


def distilled() -> dict[str, Any]:
    one = {speed.RATE: 100.0, "ttft_p50": 0.5, speed.FIRST_ALONE: 0.1}
    names = (speed.UNCACHED, speed.CACHED, speed.COMPILED, speed.DISTILLED)
    record = {"task": speed.TASK, "measurements": {name: [one] * 3 for name in names}, "machine": MACHINE}
    return {"settings": {"model": "8B", **DISTILLED_SETTINGS}, "records": [record]}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    parts = [
        ("kernels", KERNELS, {"ok": True, "kernels": {}}),
        ("float32 llama", PARITY, parity("float32", 47, 1e-6)),
        ("bfloat16 8B", PARITY, parity("bfloat16", 0, 0.012)),
        ("serving 8B", SERVING, serving()),
        ("distilled 8B", DISTILLED, distilled()),
        ("training 3B, torch.compile", TRAINING, training()),
    ]
    records = [
        {"step": step, "kind": kind, "status": run_steps.DONE, "result": result, "machine": MACHINE}
        for step, kind, result in parts
    ]
    records.append(
        {"step": "fp8 cache", "kind": PARITY, "status": run_steps.FAILED, "result": None, "machine": MACHINE}
    )
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"settings": {"dry_run": False}, "records": records}), encoding="utf-8")
    return path


def test_goals(results: Path) -> None:
    found = {(goal.step, goal.what): goal.is_met for goal in goals(json.loads(results.read_text())["records"])}
    assert found == {
        ("kernels", "all kernels right"): True,
        ("float32 llama", "share of answers equal to `PeftModel.generate`"): False,
        ("bfloat16 8B", "distance of log-probabilities from float32, prefixes / base model"): False,
        ("serving 8B", "prefix of 64 / cached text, tokens/s"): True,
        ("serving 8B", "prefix of 64 / cached text, time to first token"): True,
        ("serving 8B", "prefix of 1024 / cached text, tokens/s"): True,
        ("serving 8B", "prefix of 1024 / cached text, time to first token"): True,
        ("serving 8B", "64 prefixes / 64 LoRA of rank 8, tokens/s"): True,
        ("training 3B, torch.compile", "batch 4, prefix 128: step of ours, flat / PEFT prefix tuning, flat"): False,
        ("training 3B, torch.compile", "batch 4, prefix 128: step of ours, MLP / PEFT prefix tuning, MLP"): False,
    }


def test_report(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    page.write_text("\n".join(markers("gpu")), encoding="utf-8")
    text = write_report(results, page)
    assert "| float32 llama | 47 of 48 | 0.01 (0.02) | 1e-06 (2e-06) | 1e-06 (2e-06) |" in text
    assert "| serving 8B | prefix of 64 / cached text, tokens/s | 2.000 | at least 0.98 | yes |" in text
    assert "| prefix of 64 / cached text of 64, same engine | offline | 2.000 (2.000 to 2.000) |" in text
    assert "A prefix of 256 tokens against 4096 tokens of context" in text
    assert "| batch 4, prefix 128 | step / limit |" in text
    assert "3B, bfloat16, torch.compile, rows of 512 tokens" in text
    assert "| fp8 cache | failed |  |" in text
    assert "A GPU; torch 2; revision abc." in text
    assert text in page.read_text(encoding="utf-8")
    for plot in ("gpu-serving-8b.png", "gpu-training-3b-torch.compile.png"):
        assert (tmp_path / plot).stat().st_size > 10_000
        assert f"({plot})" in page.read_text(encoding="utf-8")


def test_nothing_is_measured_yet(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    page.write_text("\n".join(markers("gpu")), encoding="utf-8")
    assert write_report(tmp_path / "none.json", page) == NO_RESULTS
    assert NO_RESULTS in page.read_text(encoding="utf-8")


def dry_run(path: Path, *arguments: str) -> dict[str, Any]:
    assert main(["--dry-run", "--results", str(path), *arguments]) == 0, path.with_suffix(".log").read_text()[-8000:]
    return {record["step"]: record for record in json.loads(path.read_text(encoding="utf-8"))["records"]}


@pytest.mark.timeout(900)
def test_dry_run(tmp_path: Path) -> None:
    records = dry_run(tmp_path / "gpu.json", "--steps", "float32 llama", "training")
    found = records["float32 llama"]["result"]
    assert found["groups"]["prefixes"]["equal"] == found["groups"]["prefixes"]["answers"] == 3 * 2 * 4
    assert found["distinct"] == 3
    (cell,) = records["training"]["result"]["records"]
    assert cell["methods"].keys() == METHODS.keys()


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_whole_dry_run(tmp_path: Path) -> None:
    records = dry_run(tmp_path / "gpu.json")
    assert records.keys() == {step.name for step in plan(dry_run=True)}
    assert {record["status"] for record in records.values()} == {run_steps.DONE}
