"""An engine that cannot serve its prefixes does not start: one clear sentence, before it allocates memory."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, WhisperConfig
from vllm.utils import cpu_resource_utils
from vllm.utils.ompmultiprocessing import OMPProcessManager

from helpers.prefixed import with_prefix
from helpers.serving import support
from helpers.serving.configs import engine_config, refused
from helpers.serving.vision_configs import VISION_MODELS
from helpers.tiny import tiny_config, tiny_model
from vllm_plugin.adapters.validation import check_engine
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.front_end.cpu_cores import VARIABLE

CONFIG = support.llama_config()


def test_a_good_adapter_starts(model: Path, adapter: Path) -> None:
    spec = support.specs_in(engine_config(model, adapter).kv_transfer_config)["one"]
    assert (spec.name, spec.source, spec.num_virtual_tokens) == ("one", str(adapter), 4)


def test_requests_may_bring_all_adapters_along(model: Path, adapter: Path) -> None:
    from vllm_plugin import PrefixAdapterRequest
    from vllm_plugin.adapters.runtime_loading import adapter_of

    config = engine_config(model, {})
    assert support.specs_in(config.kv_transfer_config) == {}
    spec = adapter_of(PrefixAdapterRequest("one", lora_path=str(adapter)), config)
    assert support.specs_in(config.kv_transfer_config) == {"one": spec}


def test_disabled_prefix_caching_warns_once(model: Path, adapter: Path, log: pytest.LogCaptureFixture) -> None:
    for setting in (True, False):
        engine_config(model, adapter, enable_prefix_caching=setting)
    assert [record.getMessage() for record in log.records if "caching" in record.getMessage()] == [
        "Prefix caching is off: every request gets a copy of its prefix of its own; leave it on to share one."
    ]


def test_another_base_model_name_warns(model: Path, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    for name in ("org/model", "org/other"):
        prefix = support.random_prefix(CONFIG, 4)
        engine_config(model, support.write_adapter(tmp_path / name, CONFIG, prefix, base_model_name_or_path=name))
    assert [record.getMessage() for record in log.records if "trained on" in record.getMessage()] == [
        f"Prefix adapter 'one' was trained on org/other and is served on {model}: the architecture fits, but only the same "
        "weights give the same answers."
    ]


def test_missing_and_corrupt_adapters(model: Path, adapter: Path) -> None:
    refused(model, "/nowhere/at/all", "neither a folder nor a Hub repository")
    refused(model, "nobody/nothing", "the Hub has no such repository")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    refused(model, adapter, "cannot be read as safetensors")
    weights.unlink()
    refused(model, adapter, "No adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused(model, adapter, "is of type 'LORA', not a prefix")


def test_an_adapter_of_an_encoder_decoder_model(model: Path, adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    config["prefix_layers"][1]["attention"] = "cross"
    path.write_text(json.dumps(config))
    refused(model, adapter, "is of an encoder-decoder model, which vLLM does not serve")


def test_an_adapter_trained_on_lora_needs_enable_lora(model: Path, adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    base_adapter = {"name": "tone", "peft_type": "LORA", "digest": "ab" * 32, "base_model_name_or_path": None}
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_adapters": [base_adapter]}))
    refused(
        model, adapter, "trained on the base model with LORA adapter 'tone' (sha256 abababababababab), and the server"
    )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "rope_parameters.rope_theta is 500.0"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3 in the adapter and 2 in the model"),
        ({"head_dim": 16}, "head_dim is 16 in the adapter and 32 in the model"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4 in the adapter and 2 in the model"),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_another_base_model(model: Path, tmp_path: Path, other: dict[str, Any], message: str, recorded: bool) -> None:
    trained_on = LlamaConfig(**{**CONFIG.to_dict(), **other})
    fields = {} if recorded else {"base_fingerprint": {}}
    adapter = support.write_adapter(tmp_path, trained_on, support.random_prefix(trained_on, 4), **fields)
    if recorded:
        refused(model, adapter, message)
    elif "rope_parameters" not in other:
        # Without a fingerprint, the shapes still differ.
        refused(model, adapter, "was trained on another base model")


@pytest.mark.parametrize(("value", "message"), [(1e5, "holds values too large for float16"), (math.nan, "NaN or Inf")])
def test_values_are_checked_with_the_first_request(model: Path, tmp_path: Path, value: float, message: str) -> None:
    from vllm_plugin import PrefixAdapterRequest
    from vllm_plugin.adapters.runtime_loading import adapter_of

    prefix = support.random_prefix(CONFIG, 4)
    prefix[1][1][0, 0, 0] = value
    adapter = support.write_adapter(tmp_path, CONFIG, prefix)
    config = engine_config(model, adapter, dtype="float16")
    assert support.specs_in(config.kv_transfer_config)["one"].digest == ""
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            adapter_of(PrefixAdapterRequest("one"), config)
    if value == 1e5:
        assert adapter_of(PrefixAdapterRequest("one"), engine_config(model, adapter)).digest


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 5}, "has 4 virtual tokens, which leaves no room in a context of 5"),
        ({"served_model_name": ["base", "one"]}, "'one' is already the name of a model"),
        ({"runner": "pooling"}, "do not support pooling models"),
        ({"tensor_parallel_size": 4, "decode_context_parallel_size": 2}, "do not support context parallelism"),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size replaces the KV connector"),
        (
            {"kv_transfer_config": {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}},
            "cannot run beside the KV connector 'LMCacheConnectorV1'",
        ),
    ],
)
def test_unsupported_settings(model: Path, adapter: Path, settings: dict[str, Any], message: str) -> None:
    refused(model, adapter, message, **settings)


def test_longrope_is_served_up_to_its_original_length(tmp_path: Path) -> None:
    """Beyond it, vLLM takes the factors of long texts for short ones, too, and the keys of a prefix do not fit."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 128, **factors}
    base = tiny_model("phi3", rope_parameters=rope, max_position_embeddings=512, original_max_position_embeddings=128)
    base.save_pretrained(tmp_path / "base")
    adapter = tmp_path / "adapter"
    with pytest.warns(UserWarning, match="rotates its keys by the length of the text"):
        with_prefix(base).save_pretrained(str(adapter))
    engine_config(tmp_path / "base", adapter, max_model_len=128)
    refused(tmp_path / "base", adapter, "over 128, vLLM rotates the keys of short texts", max_model_len=129)


def test_returned_routed_experts_are_refused(model: Path, adapter: Path) -> None:
    config = engine_config(model, adapter)
    # An option of model runner V2, which does not run on CPU.
    config.aux_output_config.enable_return_routed_experts = True
    with pytest.raises(PrefixServeError, match="do not support --enable-return-routed-experts"):
        check_engine(config)


def test_whisper_is_refused(adapter: Path, tmp_path: Path) -> None:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 1}
    whisper = WhisperConfig(**sizes, decoder_attention_heads=1, architectures=["WhisperForConditionalGeneration"])
    whisper.save_pretrained(tmp_path / "whisper")
    refused(tmp_path / "whisper", adapter, "do not support encoder-decoder models yet", max_model_len=128)


@pytest.mark.parametrize(
    ("settings", "enabled", "may_be_missing"),
    [
        ({}, False, False),
        ({"enable_mm_embeds": True}, True, False),
        (
            {
                "ec_transfer_config": {
                    "ec_connector": "ECExampleConnector",
                    "ec_role": "ec_consumer",
                    "engine_id": "one",
                }
            },
            True,
            True,
        ),
    ],
)
def test_embeddings_of_media_are_accepted_if_the_operator_asks(
    tmp_path: Path, settings: dict[str, Any], enabled: bool, may_be_missing: bool
) -> None:
    config = VISION_MODELS["qwen2_5_vl"].config()
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(tmp_path / "model")
    adapter = support.write_adapter(tmp_path / "adapter", config, support.random_prefix(config.text_config, 4))
    media = engine_config(tmp_path / "model", adapter, **settings).model_config.multimodal_config
    assert (media.enable_mm_embeds, media.allow_missing_mm_embeddings) == (enabled, may_be_missing)


def test_mamba_is_refused(adapter: Path, tmp_path: Path) -> None:
    mamba = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8)
    AutoModelForCausalLM.from_config(mamba).save_pretrained(tmp_path / "mamba")
    refused(tmp_path / "mamba", adapter, "do not support models without attention layers")


LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64, "architectures": ["DeepseekV3ForCausalLM"]}


@pytest.mark.parametrize(
    ("name", "config", "environment", "message"),
    [
        (
            "deepseek_v3",
            LATENT,
            {"VLLM_MLA_DISABLE": "1"},
            "do not support VLLM_MLA_DISABLE=1 with latent attention (MLA)",
        ),
        ("deepseek_v3", {**LATENT, "rope_interleave": False}, {}, 'do not support "rope_interleave": false'),
        ("deepseek_v3", {**LATENT, "index_topk": 32}, {}, "do not support sparse attention with an indexer"),
        ("deepseek_v3", LATENT, {}, "has 2 KV heads of size 32, and vLLM's cache has 1 of size 512"),
    ],
)
def test_latents_that_are_not_those_of_a_prefix(
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    config: dict[str, Any],
    environment: dict[str, str],
    message: str,
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    base = tiny_config(name, **config)
    base.save_pretrained(tmp_path / name)
    # With the fingerprint of the model, so that only its heads tell the adapter from one of this model.
    prefix = support.random_prefix(CONFIG, 4)
    refused(tmp_path / name, support.write_adapter(tmp_path / "one", base, prefix), message)


@pytest.mark.parametrize("num_cores", [2, 3, 8])
def test_prefixes_cost_no_cpu_core(model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, num_cores: int) -> None:
    monkeypatch.setattr(cpu_resource_utils, "get_allowed_cpu_list", lambda: cores)
    monkeypatch.setattr(cpu_resource_utils, "get_visible_memory_node", lambda: [0])
    monkeypatch.setattr("vllm_plugin.front_end.cpu_cores._num_cores", lambda: num_cores)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "auto")
    cores = [cpu_resource_utils.LogicalCPUInfo(core, core, 0) for core in range(num_cores)]

    def num_computing(sources: Any) -> int:
        monkeypatch.delenv(VARIABLE, raising=False)
        (computing,) = OMPProcessManager(engine_config(model, sources)).cpu_lists
        return len(computing)

    assert num_computing(adapter) >= num_computing(None) >= num_cores - 1
    monkeypatch.setenv(VARIABLE, "1")
    engine_config(model, adapter)
    assert os.environ[VARIABLE] == "1"
