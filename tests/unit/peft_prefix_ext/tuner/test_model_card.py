"""The model card, and what `push_to_hub` uploads."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from helpers.prefixed import with_prefix
from helpers.tiny import random_ids, tiny_model
from peft_prefix_ext import PrefixExtConfig, read_prefix
from peft_prefix_ext.checkpoint.hub import resolve


@pytest.fixture
def base(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub without a network: what would be uploaded is copied into a folder by the name of the repository."""

    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            path = tmp_path / "hub" / repo_id / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(operation.path_or_fileobj, path)
        return SimpleNamespace(commit_url="")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    return tmp_path / "hub"


def test_the_card_says_what_the_prefix_is(base, tmp_path):
    with_prefix(base, reparam="mlp", reparam_latent_size=8, reparam_hidden_size=4).save_pretrained(tmp_path / "saved")
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model == str(tmp_path / "base")
    assert card.data.pipeline_tag == "text-generation"
    assert {"peft-prefix-ext", "prefix-tuning", "transformers", f"base_model:adapter:{tmp_path}/base"} <= {
        *card.data.tags
    }
    for line in (
        "| task | `CAUSAL_LM` |",
        "| virtual tokens | 7 |",
        "| starts as | 7 virtual tokens: random K/V of standard deviation 1.0 |",
        "| reparameterization | `mlp`, folded into the K/V when saved |",
        # 7 latents of 8, one hidden layer of 4, a head for the 3 layers' K and V of 2 heads of 16
        f"| parameters in training | {7 * 8 + 9 * 4 + 5 * 3 * 2 * 32:,} |",
        f"| parameters of the prefix | {3 * 2 * 2 * 7 * 16:,} (the K/V of 3 layers) |",
        f"vllm serve {tmp_path}/base --prefix-adapter NAME=PATH_OR_REPO",
        "import peft_prefix_ext  # tells PEFT of the type PREFIX_EXT",
        "`KeyError: 'PREFIX_EXT'` means that nothing imported `peft_prefix_ext`",
        f"prefix-ext run lm_eval --model hf --model_args pretrained={tmp_path}/base,peft=PATH_OR_REPO --tasks TASK",
    ):
        assert line in card.text
    assert "More Information Needed" not in card.text
    assert "### Framework versions" in card.text


def test_a_relative_base_is_named_by_its_absolute_path(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = with_prefix(AutoModelForCausalLM.from_pretrained("base"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    model.save_pretrained(tmp_path / "saved")
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert card.data.base_model == str(tmp_path / "base")
    assert [tag for tag in card.data.tags if tag.startswith("base_model:")] == [f"base_model:adapter:{tmp_path}/base"]
    assert f"vllm serve {tmp_path}/base " in card.text


def test_a_card_of_the_user_stays(base, tmp_path):
    model = with_prefix(base)
    model.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "README.md"
    path.write_text("# Mine\n\nMy words.\n\n" + path.read_text().partition("---\n\n")[2] + "\nMore of mine.\n")
    for _ in range(2):
        model.save_pretrained(tmp_path / "saved")
        text = path.read_text()
        assert all(words in text for words in ("# Mine", "My words.", "More of mine."))
        assert text.count("## Prefix `default`") == 1


def test_push_to_hub_uploads_all_a_server_needs(base, hub):
    model = with_prefix(base, reparam="mlp")
    model.push_to_hub("user/describe")
    folder = hub / "user" / "describe"
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert (
        f"vllm serve {base.name_or_path} --prefix-adapter describe=user/describe\n"
        in (folder / "README.md").read_text()
    )
    assert "More Information Needed" not in (folder / "README.md").read_text()
    assert read_prefix(folder).base_model_name_or_path == base.name_or_path
    ids = random_ids(1, 6)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.name_or_path), folder)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_several_adapters_in_one_repository(base, hub, monkeypatch):
    model = with_prefix(base)
    model.add_adapter("long", PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=9))
    model.push_to_hub("user/both")
    text = (hub / "user" / "both" / "README.md").read_text()
    assert "--prefix-adapter both=user/both\n" in text
    assert "--prefix-adapter long=user/both/long\n" in text

    def snapshot_download(repo_id, revision, allow_patterns):
        kept = hub / "downloaded" / repo_id / str(revision)
        for pattern in allow_patterns:
            (kept / pattern).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / repo_id / pattern, kept / pattern)
        return str(kept)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    lengths = {source: read_prefix(resolve(source)).num_virtual_tokens for source in ("user/both", "user/both/long@v1")}
    assert lengths == {"user/both": 7, "user/both/long@v1": 9}


def test_the_card_of_a_prefix_on_lora_has_no_serve_command(base, tmp_path):
    lora = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model = get_peft_model(lora, PrefixExtConfig(task_type="CAUSAL_LM"), adapter_name="prefix")
    model.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "README.md").read_text()
    assert "| on top of | `default` (LORA) |" in text
    assert "vllm serve" not in text


def test_cards_of_other_adapters_stay(base, tmp_path):
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert "prefix" not in Path(tmp_path / "README.md").read_text()
