"""LoRA modules, prefixes on LoRA, prefixes on the base model and the base model, on one server with priorities."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers.serving import server, support
from helpers.serving.on_lora import greedy, train
from helpers.serving.support import prompt_ids, text_of

pytestmark = pytest.mark.soak


def priority(job: tuple[str, list[int]]) -> dict[str, int]:
    """Long prompts come first. Offline tests check the order of the queue."""
    return {"priority": -len(job[1])}


def test_each_has_the_lora_it_names(server_folder: Path, tmp_path: Path) -> None:
    model = server_folder / "model"
    # `first/prefix` on `first`, `second` on `second/lora`.
    on_lora = train(tmp_path / "first", model, 1, lora_first=True)
    late = train(tmp_path / "second", model, 2, lora_first=False)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    alone = PeftModel.from_pretrained(base, tmp_path / "first").eval()
    reference = support.Reference(model)
    # One more than there are LoRA adapters: see `base_lora.confuses_slots`.
    options = (
        "--enable-lora",
        "--max-loras",
        "4",
        "--max-lora-rank",
        "8",
        "--lora-modules",
        f"alone={tmp_path / 'first'}",
        *("--scheduling-policy", "priority", "--max-num-seqs", "3"),
    )
    adapters = {"on-lora": tmp_path / "first" / "prefix", "pirate": server_folder / "pirate"}
    with server.serve(server_folder, *options, adapters=adapters) as client:
        server.load(client, "late", tmp_path / "second")
        assert [each.id for each in client.models.list()] == ["base", "alone", "on-lora", "pirate", "late"]
        jobs, expected = [], []
        for length in (5, 40):
            prompt = prompt_ids(length, seed=length)
            jobs += [(name, prompt) for name in ("alone", "on-lora", "late", "pirate", "base")]
            expected += [greedy(each, prompt, 6) for each in (alone, on_lora, late)]
            expected += [reference.greedy(prompt, prefix, 6) for prefix in (server.PREFIXES["pirate"], None)]
        assert len(set(map(tuple, expected))) == len(expected)
        for _ in range(2):
            with ThreadPoolExecutor(len(jobs)) as pool:
                responses = list(pool.map(lambda job: server.complete(client, *job, extra_body=priority(job)), jobs))
            for (name, _), response, tokens in zip(jobs, responses, expected, strict=True):
                assert response.model == name
                assert response.choices[0].text.split() == text_of(tokens).split(), name
        for name in ("alone", "on-lora"):
            with pytest.raises(openai.ConflictError):
                server.load(client, name, tmp_path / "second")
