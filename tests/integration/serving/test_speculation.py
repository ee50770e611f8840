"""Speculative decoding with prefixes: the same tokens whatever drafts, and as many drafts accepted as without a prefix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.serving import support
from helpers.serving.engines import Engine, Pool
from helpers.serving.support import prompt_ids
from helpers.tiny import tiny_config
from vllm_plugin import PrefixAdapterRequest

CONFIG = support.llama_config()
LENGTHS = (7, 32, 45)
PROMPTS = (3, 40)
NUM_DRAFTED = 3
# One by the prompt, then steps whose drafts are all accepted.
NEW_TOKENS = 1 + 4 * (1 + NUM_DRAFTED)


class Speculating:
    """An engine that speculates, with counts of the drafts since the last look."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._seen = (0, 0)

    def check(self, *names: str | None, max_tokens: int = NEW_TOKENS) -> tuple[int, int]:
        """Compares all tokens of two prompts per adapter with transformers; returns the accepted and all drafted tokens."""
        requests = [(name, prompt_ids(length, seed=length)) for name in names for length in PROMPTS]
        self.accepted()
        self.engine.check([name for name, _ in requests], [prompt for _, prompt in requests], max_tokens)
        return self.accepted()

    def accepted(self) -> tuple[int, int]:
        names = ("vllm:spec_decode_num_accepted_tokens", "vllm:spec_decode_num_draft_tokens")
        values = {metric.name: int(metric.value) for metric in self.engine.llm.get_metrics() if metric.name in names}
        before, self._seen = self._seen, (values[names[0]], values[names[1]])
        return self._seen[0] - before[0], self._seen[1] - before[1]


def speculate(pool: Pool, config: Any, lengths: tuple[int, ...] = LENGTHS, **settings: Any) -> Speculating:
    engine = pool.start(config, lengths, **settings)
    return Speculating(engine)


def check_cold_and_warm(speculating: Speculating) -> None:
    engine = speculating.engine
    names = [None, *engine.prefixes]
    for _ in range(2):
        speculating.check(*names)
    prompt = prompt_ids(40)
    outputs = engine.generate(names, [prompt] * len(names))
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == len(names)


# The draft model is the model itself. So all drafts are accepted as long as it has read what the model has.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drafts")
    support.write_model(folder / "draft", CONFIG)
    for length in LENGTHS:
        prefix = support.random_prefix(CONFIG, length, seed=100 + length)
        support.write_adapter(folder / f"d{length}", CONFIG, prefix)
        support.write_adapter(folder / f"d{length}-draft", CONFIG, prefix)
    return folder


@pytest.fixture(scope="module")
def drafting(pool: Pool, folder: Path) -> Iterator[Speculating]:
    more = {
        f"d{length}": {"path": str(folder / f"d{length}"), "draft_path": str(folder / f"d{length}-draft")}
        for length in LENGTHS
    }
    draft = {"method": "draft_model", "model": str(folder / "draft"), "num_speculative_tokens": NUM_DRAFTED}
    drafting = speculate(pool, CONFIG, more=more, speculative_config=draft)
    for length in LENGTHS:
        drafting.engine.prefixes[f"d{length}"] = support.random_prefix(CONFIG, length, seed=100 + length)
    yield drafting
    pool.close()


def test_a_draft_model_changes_no_token(drafting: Speculating) -> None:
    check_cold_and_warm(drafting)


def test_drafts_are_accepted_with_a_prefix_for_the_draft_model(drafting: Speculating) -> None:
    with_draft = [f"d{length}" for length in LENGTHS]
    for warm in (False, True):
        if not warm:
            assert drafting.engine.llm.reset_prefix_cache()
        base, drafted = drafting.check(None)
        assert base == drafted > 20
        accepted, drafted = drafting.check(*with_draft)
        assert accepted == drafted == len(LENGTHS) * base
        accepted, drafted = drafting.check(*(f"p{length}" for length in LENGTHS))
        assert accepted < drafted / 4
    # All in one batch.
    drafting.check(None, *with_draft, "p7")


def test_what_the_draft_model_has_of_a_prefix_cannot_end_an_engine(drafting: Speculating) -> None:
    context = drafting.engine.llm.llm_engine.vllm_config.compilation_config.static_forward_context
    caches = [module.kv_cache for name, module in context.items() if name.startswith("draft_model.")]
    assert len(caches) == CONFIG.num_hidden_layers
    assert drafting.engine.llm.reset_prefix_cache()
    for cache in caches:
        cache.fill_(torch.nan)
    drafting.check("p7", "p32", "p45")
    for cache in caches:
        cache.zero_()
    assert drafting.engine.llm.reset_prefix_cache()
    accepted, drafted = drafting.check(None, "d32")
    assert accepted == drafted


def test_a_changed_draft_prefix_is_another_prefix(
    drafting: Speculating, folder: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """It shares no block with the old one; and an unreadable one costs drafts, and no request."""
    engine = drafting.engine
    # It fills one block.
    prefix = engine.prefixes["d32"]
    for name in ("new", "new-draft"):
        support.write_adapter(tmp_path / name, CONFIG, prefix)
    prompt = prompt_ids(40)

    def accepted_with(request: PrefixAdapterRequest) -> tuple[int, int]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
        drafting.accepted()
        (output,) = engine.llm.generate({"prompt_token_ids": prompt}, params, lora_request=request, use_tqdm=False)
        assert list(output.outputs[0].token_ids) == engine.reference.greedy(prompt, prefix, NEW_TOKENS)
        return drafting.accepted()

    accepted, drafted = accepted_with(
        PrefixAdapterRequest("new", 1, str(tmp_path / "new"), draft_path=str(tmp_path / "new-draft"))
    )
    assert accepted == drafted
    support.write_adapter(tmp_path / "new-draft", CONFIG, support.random_prefix(CONFIG, 32, seed=9))
    accepted, drafted = accepted_with(PrefixAdapterRequest("new", load_inplace=True))
    assert accepted < drafted / 4
    support.write_adapter(tmp_path / "new-draft", CONFIG, prefix)
    accepted, drafted = accepted_with(PrefixAdapterRequest("new", load_inplace=True))
    assert accepted == drafted
    shutil.rmtree(tmp_path / "new-draft")
    assert engine.llm.reset_prefix_cache()
    for manager in (engine.writer._manager, engine.draft_writer._manager):
        manager._on_device.make_room(manager._on_device.capacity)
    accepted, drafted = accepted_with(PrefixAdapterRequest("new"))
    assert accepted < drafted / 4
    assert "Fewer drafts of its requests are accepted." in log.text


# Heads with random weights, whose drafts are seldom right.


@pytest.fixture
def own_engine(pool: Pool) -> Iterator[Pool]:
    pool.close()
    yield pool
    pool.close()


def test_eagle_changes_no_token(own_engine: Pool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = support.llama_config(num_hidden_layers=1, architectures=["LlamaForCausalLM"])
    weights = {
        name.removeprefix("model."): weight.clone()
        for name, weight in AutoModelForCausalLM.from_config(config).state_dict().items()
        if ".layers." in name and "input_layernorm" not in name
    }
    size = config.hidden_size
    config.save_pretrained(tmp_path)
    save_file({**weights, "fc.weight": torch.randn(size, 2 * size) * 0.1}, tmp_path / "model.safetensors")
    eagle = {"method": "eagle", "model": str(tmp_path), "num_speculative_tokens": 2}
    check_cold_and_warm(speculate(own_engine, CONFIG, speculative_config=eagle))


def add_mtp_layer(folder: Path) -> None:
    """Gives a saved model a layer for multi-token prediction: a copy of its last layer, and what joins it to the model."""
    weights = load_file(folder / "model.safetensors")
    config = AutoConfig.from_pretrained(folder)
    last, size = config.num_hidden_layers - 1, config.hidden_size
    new = f"model.layers.{last + 1}."
    copied = {
        name.replace(f"model.layers.{last}.", new): weight.clone()
        for name, weight in weights.items()
        if name.startswith(f"model.layers.{last}.")
    }
    torch.manual_seed(4)
    joining = {
        "enorm.weight": torch.ones(size),
        "hnorm.weight": torch.ones(size),
        "eh_proj.weight": torch.randn(size, 2 * size) * 0.1,
        "shared_head.norm.weight": torch.ones(size),
        "shared_head.head.weight": weights["lm_head.weight"].clone(),
        "embed_tokens.weight": weights["model.embed_tokens.weight"].clone(),
    }
    more = {new + name: weight for name, weight in joining.items()}
    save_file({**weights, **copied, **more}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.soak
def test_multi_token_prediction_changes_no_token(own_engine: Pool) -> None:
    config = tiny_config(
        "glm4_moe", head_dim=32, num_hidden_layers=2, max_position_embeddings=1024, num_nextn_predict_layers=1
    )
    mtp = {"method": "mtp", "num_speculative_tokens": 1}
    check_cold_and_warm(speculate(own_engine, config, prepare=add_mtp_layer, speculative_config=mtp))


@pytest.mark.soak
def test_medusa_changes_no_token(own_engine: Pool, tmp_path: Path) -> None:
    size, vocabulary, heads = CONFIG.hidden_size, CONFIG.vocab_size, 2
    fields = {"hidden_size": size, "vocab_size": vocabulary, "num_heads": heads, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "medusa", "architectures": ["MedusaModel"], **fields})
    )
    torch.manual_seed(5)
    shapes = {"blocks.{}.layers.0.weight": (size, size), "lm_heads.{}.weight": (vocabulary, size)}
    weights = {name.format(head): torch.randn(shape) * 0.1 for name, shape in shapes.items() for head in range(heads)}
    save_file(weights, tmp_path / "model.safetensors")
    medusa = {"method": "medusa", "model": str(tmp_path), "num_speculative_tokens": heads}
    check_cold_and_warm(speculate(own_engine, CONFIG, speculative_config=medusa))
