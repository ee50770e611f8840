"""What keeps an engine from starting: one clear sentence, before it takes any memory."""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig
from vllm.entrypoints.openai.models.protocol import LoRAModulePath

from serving import support
from vllm_plugin import cli, compat, config, prefix_adapters, startup
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.registry import registry_in

CONFIG = support.llama_config()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.write_model(tmp_path_factory.mktemp("startup") / "model", CONFIG)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return support.write_adapter(tmp_path / "adapter", CONFIG, support.random_prefix(CONFIG, 4))


def engine_config(model: Path, sources: Any, **settings: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    if isinstance(sources, (str, Path)):
        sources = {"one": str(sources)}
    if isinstance(sources, dict):
        settings |= prefix_adapters(sources, settings.pop("kv_transfer_config", None))
    return EngineArgs(
        **{"model": str(model), "skip_tokenizer_init": True, "max_model_len": 256, "dtype": "float32", **settings}
    ).create_engine_config()


def refused(model: Path, sources: Any, message: str, **settings: Any) -> None:
    with pytest.raises(PrefixServeError, match=r"\A[^\n]*\Z") as caught:
        engine_config(model, sources, **settings)
    assert message in str(caught.value)


def test_a_good_adapter_starts(model: Path, adapter: Path) -> None:
    spec = support.specs_in(engine_config(model, adapter).kv_transfer_config)["one"]
    assert (spec.name, spec.source, spec.num_virtual_tokens) == ("one", str(adapter), 4)


def test_no_prefix_caching_is_worth_one_warning(model: Path, adapter: Path, caplog: pytest.LogCaptureFixture) -> None:
    for setting in (True, False):
        engine_config(model, adapter, enable_prefix_caching=setting)
    assert [record.getMessage() for record in caplog.records if "caching" in record.getMessage()] == [
        "Prefix caching is off: every request gets a copy of its prefix of its own; leave it on to share one."
    ]


def test_without_adapters_nothing_changes(model: Path, adapter: Path) -> None:
    code = """
import sys
import wrapt
from vllm.engine.arg_utils import EngineArgs
from vllm_plugin import prefix_adapters, register
from vllm_plugin.seams import ENGINE_SEAMS, SERVER_SEAMS

def wrapped():
    return [seam.method for seam in (*ENGINE_SEAMS, *SERVER_SEAMS) if isinstance(resolve(seam), wrapt.FunctionWrapper)]

def resolve(seam):
    path, attribute, original = wrapt.resolve_path(seam.module, seam.method)
    return original

register()
args = {"model": sys.argv[1], "skip_tokenizer_init": True, "max_model_len": 256}
without = EngineArgs(**args).create_engine_config().kv_transfer_config, wrapped()
EngineArgs(**args, **prefix_adapters(one=sys.argv[2])).create_engine_config()
print(without, wrapped() == [seam.method for seam in ENGINE_SEAMS])
"""
    command = [sys.executable, "-c", code, str(model), str(adapter)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "(None, []) True"


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


def test_an_adapter_that_stands_on_another_one(model: Path, adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    below = {"name": "tone", "peft_type": "LORA", "digest": "ab" * 32, "base_model_name_or_path": None}
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_adapters": [below]}))
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
        # Without a fingerprint, the shapes still tell.
        refused(model, adapter, "was trained on another base model")


def test_an_adapter_whose_numbers_the_model_cannot_hold(model: Path, tmp_path: Path) -> None:
    prefix = support.random_prefix(CONFIG, 4)
    prefix[1][1][0, 0, 0] = 1e5
    adapter = support.write_adapter(tmp_path, CONFIG, prefix)
    engine_config(model, adapter)
    refused(model, adapter, "holds values too large for float16", dtype="float16")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 5}, "has 4 virtual tokens, which leaves no room in a context of 5"),
        ({"served_model_name": ["base", "one"]}, "'one' is already the name of a model"),
        ({"runner": "pooling"}, "do not support pooling models"),
        (
            {"speculative_config": {"method": "draft_model", "num_speculative_tokens": 2}},
            "do not support speculative decoding other than by n-grams",
        ),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size replaces the KV connector"),
        (
            {"kv_transfer_config": {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}},
            "cannot run beside the KV connector 'LMCacheConnectorV1'",
        ),
    ],
)
def test_unsupported_settings(model: Path, adapter: Path, settings: dict[str, Any], message: str) -> None:
    if draft := settings.get("speculative_config"):
        settings = {"speculative_config": {**draft, "model": str(model)}}
    refused(model, adapter, message, **settings)


def test_mamba_is_refused(adapter: Path, tmp_path: Path) -> None:
    mamba = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8)
    AutoModelForCausalLM.from_config(mamba).save_pretrained(tmp_path / "mamba")
    refused(tmp_path / "mamba", adapter, "do not support models with Mamba or linear-attention layers")


def test_another_connector_is_kept_behind_ours(model: Path, adapter: Path) -> None:
    theirs = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 20},
    }
    merged = engine_config(model, adapter, kv_transfer_config=theirs).kv_transfer_config
    children = merged.kv_connector_extra_config["connectors"]
    assert [child["kv_connector"] for child in children] == ["PrefixConnector", "OffloadingConnector"]
    assert merged.kv_load_failure_policy == "fail"
    assert support.specs_in(merged)["one"].num_virtual_tokens == 4


def test_settings_of_several_connectors_are_kept(model: Path, adapter: Path) -> None:
    extra = {"connectors": [], "mine": 1}
    theirs = {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    merged = engine_config(model, adapter, kv_transfer_config=theirs).kv_transfer_config
    assert merged.kv_connector_extra_config["mine"] == 1
    assert support.specs_in(merged).keys() == {"one"}


@pytest.mark.parametrize(
    "text",
    [
        *("one", "one=", "=path", "a b=path", "-x=path", "../x=path", "x" * 257 + "=path"),
        *('{"name": "a"', '{"name": "a"}', '{"name": "a", "path": 7}', '{"name": "a", "path": "/x", "rank": "8"}'),
        *('{"name": "a b", "path": "/x"}', '{"name": "a", "path": ""}', '{"name": null, "path": "/x"}'),
    ],
)
def test_malformed_options(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"\A[^\n]*\Z"):
        cli.parse_adapter(text)


def parsed(*options: str) -> argparse.Namespace:
    """Reads options as `vllm serve` does, which has ideas of its own about JSON."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    cli.add_argument(parser)
    cli.add_argument(parser)
    return parser.parse_args([*options])


def test_options_add_up_and_names_are_unique() -> None:
    in_json = '{"name": "d", "path": "/w", "base_model_name": "base"}'
    options = parsed("--prefix-adapter", "a=/x", "b=org/repo", "--prefix-adapter", "c=/y=z", in_json).prefix_adapter
    assert options == [("a", "/x", None), ("b", "org/repo", None), ("c", "/y=z", None), ("d", "/w", "base")]
    cli.check_unique(options)
    with pytest.raises(PrefixServeError, match="'a' is given twice"):
        cli.check_unique([*options, cli.AdapterOption("a", "/z")])
    with pytest.raises(PrefixServeError, match="at least one"):
        prefix_adapters()


@pytest.mark.parametrize("gib", ["-1", "all", "inf", "nan"])
def test_malformed_memory(gib: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"expected a number of GiB >= 0, got '{gib}'"):
        cli.parse_gib(gib)


def test_a_server_says_at_once_what_its_options_lack() -> None:
    for option in (["--prefix-adapter-warmup"], ["--prefix-adapter-device-memory", "2"]):
        with pytest.raises(PrefixServeError, match=f"{option[0]} needs"):
            startup.configure(None, parsed(*option))
    options = parsed("--prefix-adapter", "a=/x")
    options.lora_modules = [LoRAModulePath("a", "/y")]
    with pytest.raises(PrefixServeError, match="'a' is already the name of a model"):
        startup.configure(None, options)


def test_all_processes_of_a_server_have_one_registry(model: Path, adapter: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    more = ["--prefix-adapter-warmup", "--prefix-adapter-device-memory", "0.25"]
    options = parsed("--prefix-adapter", f"one={adapter}", *more)
    vars(options).update(vars(EngineArgs(model=str(model), skip_tokenizer_init=True, max_model_len=256)))
    first = EngineArgs.from_cli_args(options).create_engine_config()
    # The folder is read once, by the first process.
    (adapter / "adapter_config.json").unlink()
    copy = pickle.loads(pickle.dumps(options))
    second = EngineArgs.from_cli_args(copy).create_engine_config()
    settings = [config.settings_in(each.kv_transfer_config) for each in (first, second)]
    assert settings[0] == settings[1]
    assert settings[0] == {
        "prefix_registry": options.prefix_registry,
        "prefix_adapter_warmup": True,
        "prefix_device_memory": 2**28,
    }
    registry_in(first.kv_transfer_config).remove("one")
    assert support.specs_in(second.kv_transfer_config) == {}


def test_options_attach_the_plugin_in_spawned_servers() -> None:
    code = (
        "import pickle, sys; folder = pickle.loads(bytes.fromhex(sys.argv[1])); from vllm_plugin import compat; "
        "print(folder, type(folder).__name__, compat._installed)"
    )
    command = [sys.executable, "-c", code, pickle.dumps(cli.SharedFolder("/x")).hex()]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "/x SharedFolder True\n"


def test_the_rust_front_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(PrefixServeError, match="unset VLLM_USE_RUST_FRONTEND"):
        compat.require(server=True)


@pytest.mark.parametrize(
    "change", [lambda m: m.setattr("vllm.__version__", "0.99.0"), lambda m: m.setitem(compat._problems, "x", "gone")]
)
def test_an_unknown_vllm_is_refused(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None]
) -> None:
    monkeypatch.setattr(compat, "_problems", {})
    change(monkeypatch)
    with pytest.raises(PrefixServeError, match="Prefix adapters do not work with vLLM"):
        compat.require(server=False)


def test_an_operator_may_have_the_shapes_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    monkeypatch.setenv(compat.ANY_VERSION, "1")
    compat.require(server=True)


def test_a_changed_method_is_noticed() -> None:
    import types

    class EngineArgs:
        @staticmethod
        def add_cli_args(other: Any) -> None: ...

    module = types.SimpleNamespace(EngineArgs=EngineArgs)
    seam, other = compat.START_SEAMS[:2]
    assert seam.problem(module) == "EngineArgs.add_cli_args has no parameter parser"
    assert "has no EngineArgs.from_cli_args" in str(other.problem(module))


def test_wraps_are_put_on_once() -> None:
    from vllm.engine.arg_utils import EngineArgs

    import vllm_plugin

    before = EngineArgs.__dict__["create_engine_config"]
    vllm_plugin.register()
    compat.install()
    assert EngineArgs.__dict__["create_engine_config"] is before
