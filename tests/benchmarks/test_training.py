"""The training benchmark on a tiny random model: measurements, resuming, and the report."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.common.docs_pages import markers
from benchmarks.common.shapes import SHAPES
from benchmarks.training.__main__ import main
from benchmarks.training.benchmark import SHORT, Benchmark, Settings
from benchmarks.training.footprint import footprint
from benchmarks.training.report import cell_table, write_report
from benchmarks.training.steps import LIMIT, METHODS, STOCK_FLAT, STOCK_MLP, TrainingStep, load
from helpers.prefixed import prefix_layers
from helpers.tiny import random_ids, tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    return Settings(str(folder), batches=(1, 2), prefixes=(3, 5), length=40, rounds=2)


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "training.json"
    Benchmark(settings, path).run()
    return path


def test_each_cell_has_every_method(finished, settings):
    content = json.loads(finished.read_text())
    assert content["settings"]["batches"] == [1, 2]
    assert {(cell["batch"], cell["prefix"]) for cell in content["records"]} == {(1, 3), (1, 5), (2, 3), (2, 5)}
    for cell in content["records"]:
        assert cell["machine"]["revision"]
        methods = cell["methods"]
        assert list(methods) == list(METHODS)
        assert methods[LIMIT]["trained"] == 0
        # Three layers of K/V, two heads of 16 numbers each.
        assert methods["ours, flat"]["trained"] == methods[STOCK_FLAT]["trained"] == 3 * 2 * 2 * 16 * cell["prefix"]
        assert methods[LIMIT]["ratios"][LIMIT] == {"median": 1, "quartiles": [1, 1], "rounds": 2}
        assert all(
            len(method["seconds"]) == settings.rounds and min(method["seconds"]) > 0 for method in methods.values()
        )
        assert all(0 < method["saved"] < method["peak"] for method in methods.values())
        assert methods["ours, MLP, checkpointing"]["saved"] < methods["ours, MLP"]["saved"] / 2


def test_a_cell_is_measured_once_and_a_lost_one_again(finished, settings, tmp_path, monkeypatch):
    content = json.loads(finished.read_text())
    lost = content["records"].pop(1)
    path = tmp_path / "training.json"
    path.write_text(json.dumps(content))
    measured = []
    monkeypatch.setattr(
        Benchmark, "_measure", lambda self, batch, prefix: measured.append((batch, prefix)) or {"methods": {}}
    )
    Benchmark(settings, path).run()
    assert measured == [(lost["batch"], lost["prefix"])]
    with pytest.raises(ValueError, match="other settings"):
        Benchmark(replace(settings, **SHORT), path)


def test_named_methods_are_measured_beside_the_references(settings, tmp_path):
    path = tmp_path / "training.json"
    Benchmark(replace(settings, batches=(1,), prefixes=(3,), rounds=1), path, ["ours, flat"]).run()
    (cell,) = json.loads(path.read_text())["records"]
    assert cell["methods"].keys() == {"ours, flat", LIMIT, STOCK_FLAT, STOCK_MLP}
    assert cell_table(cell).count("\n") == 1 + 4


def test_older_results_have_the_defaults_of_newer_settings(settings):
    assert not {"attention", "compiled"} & settings.record().keys()
    assert replace(settings, attention="eager", compiled=True).record() == {
        **settings.record(),
        "attention": "eager",
        "compiled": True,
    }


def test_the_attention_function_is_that_of_the_settings():
    model = load("0.5B", torch.bfloat16, torch.device("meta"), 1, attention="eager")
    assert model.config._attn_implementation == "eager"


def test_a_compiled_step_has_the_same_loss(monkeypatch):
    # Traced, but not made into machine code, which takes half a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    base, ids = tiny_model("llama"), random_ids(2, 9)
    torch.compiler.reset()
    for name in (LIMIT, "ours, flat"):
        torch.manual_seed(0)
        plain = TrainingStep(base, METHODS[name], 5).forward(ids)
        torch.manual_seed(0)
        torch.testing.assert_close(TrainingStep(base, METHODS[name], 5, compiled=True).forward(ids), plain)
    torch.compiler.reset()


def test_counts_what_is_kept_and_the_peak():
    weight = torch.ones(256, 256, requires_grad=True)

    def forward():
        return weight.exp().sum()  # keeps its own outcome; the sum is four bytes

    def update(loss):
        torch.empty(2**20)
        loss.backward()

    assert footprint(forward, update, CPU) == {"saved": 4 * 256**2 + 4, "peak": 4 * 256**2 + 4 + 4 * 2**20}


def test_the_same_prefix_has_the_same_loss():
    base = tiny_model("llama")
    ours, stock = (TrainingStep(base, METHODS[name], 5) for name in ("ours, flat", STOCK_FLAT))
    kv = torch.stack([torch.stack([*layer.materialize("default", None)]) for layer in prefix_layers(ours.model)])
    with torch.no_grad():
        stock.model.prompt_encoder["default"].embedding.weight.copy_(kv.permute(3, 0, 1, 2, 4).reshape(5, -1))
    ids = random_ids(2, 9)
    losses = [step.forward(ids) for step in (ours, stock)]
    torch.testing.assert_close(*losses)
    assert losses[0].item() != pytest.approx(TrainingStep(base, METHODS[LIMIT], 5).forward(ids).item(), rel=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_steps_share_the_weights_and_train_their_own(name):
    base = tiny_model("llama")
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    step, ids = TrainingStep(base, METHODS[name], 5), random_ids(2, 9)
    first = step.forward(ids)
    step.update(first)
    pointers = {parameter.data_ptr() for parameter in step.model.parameters()}
    assert pointers.issuperset(parameter.data_ptr() for parameter in base.parameters())
    assert all(torch.equal(before[key], tensor) for key, tensor in base.state_dict().items())
    assert (step.forward(ids).item() == first.item()) == (name == LIMIT)


def test_the_limit_is_the_models_own_loss():
    base, ids = tiny_model("llama"), random_ids(2, 9)
    assert TrainingStep(base, METHODS[LIMIT], 5).forward(ids).item() == pytest.approx(
        base(input_ids=ids, labels=ids).loss.item()
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_random_weights_of_as_many_layers(shape):
    model = load(shape, torch.bfloat16, torch.device("meta"), num_layers=2)
    assert len(model.model.layers) == 2
    assert model.config.hidden_size == SHAPES[shape].hidden_size
    assert model.dtype == torch.bfloat16


def test_report(finished, tmp_path):
    page_file, (begin, end) = tmp_path / "training.md", markers("training")
    page_file.write_text(f"{begin}\nold\n{end}\n")
    text = write_report(finished, page_file)
    page = page_file.read_text()
    assert "old" not in page
    for name in METHODS:
        assert (text.count(f"| {name} |"), page.count(f"| {name} |")) == (4, 2)
    assert "batch 2, prefix 5" in page
    assert "batch 1, prefix 5" not in page
    assert finished.with_suffix(".png").stat().st_size > 10_000


def test_command_line(settings, tmp_path, capsys):
    path = tmp_path / "training.json"
    options = ["--model", settings.model, "--batches", "1", "--prefixes", "2", "--rounds", "1", "--length", "4"]
    assert main([*options, "--threads", "1", "--results", str(path)]) == 0
    assert "batch 1, prefix 2" in capsys.readouterr().out
    assert [record["batch"] for record in json.loads(path.read_text())["records"]] == [1]
