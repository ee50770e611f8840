"""TRL's trainers with `use_vllm=True`: the engine has the prefix that is trained, after each update."""

from __future__ import annotations

import json
import math

import pytest
from transformers import AutoTokenizer

from helpers.scripts import run_script
from helpers.serving import server
from helpers.tiny import tiny_model


@pytest.fixture(scope="module")
def folder(word_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts")
    tokenizer = AutoTokenizer.from_pretrained(word_tokenizer)
    tokenizer.eos_token = "w2"
    tokenizer.save_pretrained(folder / "base")
    tiny_model("llama", hidden_size=128, head_dim=32).save_pretrained(folder / "base")
    return folder


def trained(folder, name, *more):
    return json.loads(run_script("rollouts", folder, name, *more).splitlines()[-1])


def test_grpo_colocated(folder):
    run = trained(folder, "grpo")
    assert len(run["differences"]) >= 4
    assert max(run["differences"]) < 1e-4
    steps = [row for row in run["history"] if "loss" in row]
    assert len(steps) == 4
    for row in steps:
        for name in ("min", "mean", "max"):
            assert math.isclose(row[f"sampling/importance_sampling_ratio/{name}"], 1, abs_tol=1e-4)
    # The reference policy is the prefix as it was.
    assert abs(steps[0]["kl"]) < 1e-6
    assert steps[-1]["kl"] > 1e-4


@pytest.mark.parametrize("name", ["rloo", "online-dpo"])
def test_other_trainers_colocated(name, folder):
    run = trained(folder, name)
    assert len(run["differences"]) >= 4
    assert max(run["differences"]) < 1e-4
    steps = [row for row in run["history"] if "loss" in row]
    assert len(steps) == 4
    assert all(row["grad_norm"] > 0 for row in steps)


@pytest.mark.soak
def test_grpo_with_a_server(folder, monkeypatch):
    (folder / "model").symlink_to(folder / "base", target_is_directory=True)
    monkeypatch.setitem(server.ENVIRONMENT, "VLLM_SERVER_DEV_MODE", "1")
    options = ("--enable-prefix-adapters", "--logprobs-mode", "processed_logprobs")
    with server.serve(folder, *options, adapters={}) as client:
        url = str(client.base_url).removesuffix("/v1/")
        run = trained(folder, "grpo", url)
        assert {model.id for model in client.models.list()} == {"base", "policy"}
    assert len(run["differences"]) >= 4
    assert max(run["differences"]) < 1e-4
    steps = [row for row in run["history"] if "loss" in row]
    for row in steps:
        for name in ("min", "mean", "max"):
            assert math.isclose(row[f"sampling/importance_sampling_ratio/{name}"], 1, abs_tol=1e-4)
