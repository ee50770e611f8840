"""Speculative decoding beside prefixes: what is refused, what warns, and the prefix for the draft model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from vllm.config.speculative import SpeculativeMethod
from vllm.engine.arg_utils import EngineArgs

from helpers.serving import app, support
from vllm_plugin import prefix_adapters
from vllm_plugin.adapters.spec import PrefixSpec, pack, unpack
from vllm_plugin.adapters.speculation import lossy_speculation, warn_of_drafts
from vllm_plugin.errors import PrefixServeError

CONFIG = support.llama_config()
ALONE = {"ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator"}


def methods(literal: Any) -> Iterator[str]:
    for each in get_args(literal):
        yield from [each] if isinstance(each, str) else methods(each)


METHODS = sorted({*methods(SpeculativeMethod), "a_method_of_tomorrow"})


def drafts(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(speculative_config=SimpleNamespace(rejection_sample_method="standard", **fields))


def spec(name: str, draft: PrefixSpec | None = None, digest: str = "0") -> PrefixSpec:
    return PrefixSpec(name, "", "", 4, digest, draft=draft)


@pytest.mark.parametrize("method", METHODS)
def test_methods_whose_layers_lack_the_prefix_warn_once(method: str, log: pytest.LogCaptureFixture) -> None:
    assert {"draft_model", "eagle", "eagle3", "mtp", "dflash", "dspark", *ALONE} < set(METHODS)
    warn_of_drafts([spec(name) for name in "abcdefg"], drafts(method=method))
    assert len(log.messages) == (method not in ALONE)
    for message in log.messages:
        assert message.startswith(
            f"Speculative decoding by {method!r}: prefixes change no output, but its layers lack "
        )
        assert "of 'a', 'b', 'c', 'd', 'e', ..., so fewer drafts are accepted" in message
        assert ("name a prefix that was trained on the draft model" in message) == (method == "draft_model")


def test_only_adapters_without_a_prefix_for_the_draft_model_warn(log: pytest.LogCaptureFixture) -> None:
    config = drafts(method="draft_model")
    warn_of_drafts([spec("a", draft=spec("a"))], config)
    warn_of_drafts([], config)
    warn_of_drafts([spec("a")], SimpleNamespace(speculative_config=None))
    # Its layers read the cache of the model itself.
    warn_of_drafts([spec("a")], drafts(method="mtp", use_gemma4_mtp=lambda: True))
    assert not log.messages
    warn_of_drafts([spec("a", draft=spec("a")), spec("b")], config)
    (message,) = log.messages
    assert "lack the prefix of 'b', so" in message


@pytest.mark.parametrize("accepts_by", ["standard", "block", "synthetic", "fly"])
def test_only_exact_acceptance_is_served(accepts_by: str) -> None:
    refused = lossy_speculation(SimpleNamespace(method="ngram", rejection_sample_method=accepts_by))
    assert (refused is None) == (accepts_by in ("standard", "block"))
    assert refused is None or accepts_by in refused


# Engine configs with a draft model.


@pytest.fixture
def draft_model(tmp_path: Path) -> Path:
    """A model that is smaller than the base model."""
    return support.write_model(tmp_path / "draft-model", support.llama_config(num_hidden_layers=1))


def draft_prefix(folder: Path, length: int = 4, **overrides: Any) -> Path:
    config = support.llama_config(num_hidden_layers=1, **overrides)
    return support.write_adapter(folder, config, support.random_prefix(config, length))


def engine_config(model: Path, source: Any, speculative_config: dict[str, Any] | None = None) -> Any:
    return EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        max_model_len=256,
        dtype="float32",
        speculative_config=speculative_config,
        **prefix_adapters(one=source),
    ).create_engine_config()


def with_model(draft_model: Path, **fields: Any) -> dict[str, Any]:
    return {"method": "draft_model", "model": str(draft_model), "num_speculative_tokens": 2, **fields}


def test_a_prefix_for_the_draft_model_goes_with_the_adapter(
    model: Path, adapter: Path, draft_model: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    source = {"path": adapter, "draft_path": draft_prefix(tmp_path / "d")}
    config = engine_config(model, source, with_model(draft_model))
    assert not any("fewer drafts" in message for message in log.messages)
    found = support.specs_in(config.kv_transfer_config)["one"]
    assert found.draft is not None
    assert (found.draft.source, found.draft.num_virtual_tokens) == (str(tmp_path / "d"), 4)
    assert unpack(pack(found)) == found
    # Blocks hold the K/V of both.
    alone = engine_config(model, adapter, with_model(draft_model))
    salts = {support.specs_in(alone.kv_transfer_config)["one"].salt(None), found.salt(None)}
    assert len(salts) == 2
    assert sum("fewer drafts are accepted" in message for message in log.messages) == 1


def test_salts_tell_prefixes_for_the_draft_model_apart() -> None:
    parts = list(itertools.product("01", (None, "0", "1")))
    salts = {spec("a", draft and spec("a", digest=draft), digest=digest).salt("s") for digest, draft in parts}
    assert len(salts) == len(parts)


def test_prefixes_that_do_not_fit_the_draft_model_are_refused(
    model: Path, adapter: Path, draft_model: Path, tmp_path: Path
) -> None:
    def refused(draft_path: Any, message: str, speculative_config: Any) -> None:
        with pytest.raises(PrefixServeError, match=r"\A[^\n]*\Z") as caught:
            engine_config(model, {"path": adapter, "draft_path": draft_path}, speculative_config)
        assert message in str(caught.value)

    fits, config = draft_prefix(tmp_path / "fits"), with_model(draft_model)
    none = "names a prefix for the draft model, and this engine has none; start it with --speculative-config"
    refused(fits, none, None)
    refused(fits, none, {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2})
    longer = draft_prefix(tmp_path / "longer", length=5)
    refused(longer, f"has 4 virtual tokens, and its prefix for the draft model in {longer} has 5; train both", config)
    refused(adapter, f"for the draft model {str(draft_model)!r} cannot be used: Prefix adapter 'one': ", config)
    refused(adapter, "was trained on another base model (tiny): num_hidden_layers is 2 in the adapter", config)
    refused(draft_prefix(tmp_path / "wider", head_dim=16), "head_dim is 16 in the adapter and 32 in the model", config)
    refused("/nowhere/at/all", "neither a folder nor a Hub repository", config)
    on_lora = draft_prefix(tmp_path / "lora")
    fields = json.loads((on_lora / "adapter_config.json").read_text())
    below = {"name": "tone", "peft_type": "LORA", "digest": "ab" * 32, "base_model_name_or_path": None}
    (on_lora / "adapter_config.json").write_text(json.dumps({**fields, "base_adapters": [below]}))
    refused(on_lora, "draft models run without; train it on the draft model alone", config)


def test_lossy_acceptance_is_refused(model: Path, adapter: Path, draft_model: Path) -> None:
    lossy = with_model(draft_model, rejection_sample_method="synthetic", synthetic_acceptance_length=1.5)
    with pytest.raises(
        PrefixServeError, match=r"do not support speculative decoding that changes outputs \(.*'synthetic'\)"
    ):
        engine_config(model, adapter, lossy)


def test_the_endpoint_takes_a_prefix_for_the_draft_model(
    options: Any, draft_model: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    options.speculative_config = with_model(draft_model)
    server, path, draft = app.start(options), app.adapter(tmp_path / "two", 2), draft_prefix(tmp_path / "d")
    log.clear()
    assert app.load(server, "two", path, draft_path=str(draft)).status_code == 200
    assert not any("fewer drafts" in message for message in log.messages)
    models = server.app.state.openai_serving_models.prefix_models
    first = models.spec("two")
    assert first.draft.source == str(draft)
    draft_prefix(tmp_path / "d2", head_dim=16)
    app.assert_refused(
        app.load(server, "two", path, draft_path=str(tmp_path / "d2"), load_inplace=True), 400, "another base model"
    )
    app.assert_refused(app.load(server, "three", path, draft_path="/nowhere"), 404, "neither a folder nor a Hub")
    assert models.spec("two") == first
    assert app.load(server, "two", path, load_inplace=True).status_code == 200
    assert models.spec("two").draft is None
    assert any("fewer drafts" in message for message in log.messages)
