"""Which layers draft, by how vLLM names them, and how both models share the memory for prefixes."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.metadata import PrefixLoad
from vllm_plugin.worker.cache_layers import CacheLayer
from vllm_plugin.worker.draft_layers import draft_layer_names, draft_loads, share_memory


def config(speculative_config: Any = True) -> SimpleNamespace:
    model = SimpleNamespace(hf_text_config=SimpleNamespace(num_hidden_layers=2))
    return SimpleNamespace(model_config=model, speculative_config=speculative_config)


def attention(stem: str, *indices: int) -> list[str]:
    return [f"{stem}.{index}.self_attn.attn" for index in indices]


@pytest.mark.parametrize(
    ("layers", "drafts"),
    [
        (attention("model.layers", 0, 1), attention("draft_model.model.layers", 0, 1, 2)),
        # EAGLE, and DeepSeek's and GLM's multi-token prediction.
        (attention("model.layers", 0, 1), attention("model.layers", 2)),
        # On a multimodal model.
        (attention("language_model.model.layers", 0, 1), attention("model.layers", 2)),
        (attention("language_model.model.layers", 0, 1), attention("model.layers", 0)),
        # Qwen3-Next, Qwen3.5, Nemotron-H, EXAONE.
        (attention("model.layers", 0, 1), attention("mtp.layers", 0)),
        (attention("model.layers", 0, 1), []),
        # The last pipeline stage.
        (attention("model.layers", 1), attention("mtp.layers", 0, 1)),
    ],
)
def test_layers_of_drafts(layers: list[str], drafts: list[str]) -> None:
    groups = [SimpleNamespace(layer_names=names) for names in (drafts, layers)]
    # Not every module has a cache.
    modules = dict.fromkeys(["visual.blocks.0.attn", *layers, *drafts])
    kv_cache_config = SimpleNamespace(kv_cache_groups=groups)
    assert draft_layer_names(config(), kv_cache_config, modules) == set(drafts)
    assert draft_layer_names(config(None), kv_cache_config, modules) == set()


def test_loads_of_drafts_are_those_of_prefixes_that_have_one() -> None:
    draft = PrefixSpec("a", "", "/draft", 4, "1")
    specs = [PrefixSpec("a", "", "/a", 4, "0", draft=draft), PrefixSpec("b", "", "/b", 4, "2")]
    loads = [PrefixLoad(spec, 1, 4, ([3],)) for spec in specs]
    before = copy.deepcopy(loads)
    assert draft_loads(loads) == [PrefixLoad(draft, 1, 4, ([3],))]
    assert loads == before


def test_as_many_prefixes_of_both_models_fit() -> None:
    layers = [CacheLayer(f"{index}", index, 0, 32, 2, 32, 32) for index in range(4)]
    assert share_memory(1000, layers, []) == (1000, 0)
    assert share_memory(1000, layers, layers[:1]) == (800, 200)
    assert share_memory(0, layers, layers) == (0, 0)
