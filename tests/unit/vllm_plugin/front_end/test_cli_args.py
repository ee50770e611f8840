"""The command line's options, and how they reach every process of a server."""

from __future__ import annotations

import argparse
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from vllm.entrypoints.openai.models.protocol import LoRAModulePath

from helpers.serving import support
from vllm_plugin import prefix_adapters, prefix_serve
from vllm_plugin.adapters.options import AdapterOption, check_unique
from vllm_plugin.adapters.registry import registry_in
from vllm_plugin.errors import PrefixServeError
from vllm_plugin.front_end import cli_args, engine_config
from vllm_plugin.kv_transfer_config import settings_in
from vllm_plugin.patches.install import SharedFolder


@pytest.mark.parametrize(
    "text",
    [
        *("one", "one=", "=path", "a b=path", "-x=path", "../x=path", "x" * 257 + "=path"),
        *('{"name": "a"', '{"name": "a"}', '{"name": "a", "path": 7}', '{"name": "a", "path": "/x", "rank": "8"}'),
        *('{"name": "a", "path": "/x", "pinned": "true"}', '{"name": "a", "path": "/x", "pinned": null}'),
        *("one=path,draft=", "one=,draft=path", '{"name": "a", "path": "/x", "draft_path": ""}'),
        *('{"name": "a b", "path": "/x"}', '{"name": "a", "path": ""}', '{"name": null, "path": "/x"}'),
    ],
)
def test_malformed_options(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"\A[^\n]*\Z"):
        cli_args.parse_adapter(text)


def parsed(*options: str) -> argparse.Namespace:
    """Parses options as `vllm serve` does, which treats JSON in its own way."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    cli_args.add_argument(parser)
    cli_args.add_argument(parser)
    return parser.parse_args([*options])


def test_options_add_up_and_names_are_unique() -> None:
    in_json = '{"name": "d", "path": "/w", "base_model_name": "base"}'
    options = parsed("--prefix-adapter", "a=/x", "b=org/repo", "--prefix-adapter", "c=/y=z", in_json).prefix_adapter
    assert options == [
        AdapterOption(*each) for each in (("a", "/x"), ("b", "org/repo"), ("c", "/y=z"), ("d", "/w", "base"))
    ]
    check_unique(options)
    with pytest.raises(PrefixServeError, match="'a' is given twice"):
        check_unique([*options, AdapterOption("a", "/z")])
    with pytest.raises(PrefixServeError, match="at least one"):
        prefix_adapters()


def test_a_prefix_for_the_draft_model() -> None:
    in_json = '{"name": "b", "path": "/y", "draft_path": "/z"}'
    options = parsed("--prefix-adapter", "a=/x,y,draft=org/repo@v1", in_json).prefix_adapter
    assert options == [AdapterOption("a", "/x,y", None, "org/repo@v1"), AdapterOption("b", "/y", None, "/z")]
    offline = prefix_adapters(
        {"a": {"path": Path("/x,y"), "draft_path": "org/repo@v1"}}, b={"path": "/y", "draft_path": "/z"}
    )
    named = offline["kv_transfer_config"].kv_connector_extra_config["prefix_adapters"]
    assert [AdapterOption(**fields) for fields in named] == options
    for source in ({}, {"draft_path": "/z"}, {"path": "/y", "draft": "/z"}):
        with pytest.raises(
            PrefixServeError, match="'a' needs a path, or a mapping with `path` and, optionally, `draft_path`"
        ):
            prefix_adapters(a=source)


def test_pinned_adapters() -> None:
    in_json = '{"name": "b", "path": "/y", "pinned": true}'
    given = parsed("--prefix-adapter", "a=/x", in_json, "--prefix-adapter-pinned", "a")
    assert given.prefix_adapter == [AdapterOption("a", "/x"), AdapterOption("b", "/y", pinned=True)]
    settings = settings_in(engine_config.configure(None, given))
    assert settings["prefix_adapter_pinned"] == ["a"]
    offline = prefix_adapters(a="/x", b={"path": "/y", "pinned": True}, prefix_adapter_pinned="a")
    extra = offline["kv_transfer_config"].kv_connector_extra_config
    assert {name: extra[name] for name in ("prefix_adapters", "prefix_adapter_pinned")} == {
        name: settings[name] for name in ("prefix_adapters", "prefix_adapter_pinned")
    }
    with pytest.raises(PrefixServeError, match="`draft_path` and `pinned`, True or False, got"):
        prefix_adapters(a={"path": "/x", "pinned": "yes"})


def test_only_adapters_that_may_come_later_are_pinned_by_an_unknown_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = ("--prefix-adapter", "a=/x", "--prefix-adapter-pinned", "a", "later")
    with pytest.raises(
        PrefixServeError,
        match=r"--prefix-adapter-pinned names 'later', and there is no such adapter; this server has: a\.",
    ):
        engine_config.configure(None, parsed(*pinned))
    for more in (["--prefix-adapter-dir", str(tmp_path)], ["--prefix-adapter-hub", "me"], ["--enable-prefix-adapters"]):
        engine_config.configure(None, parsed(*pinned, *more))
    with pytest.raises(PrefixServeError, match="must be up to 256 letters"):
        engine_config.configure(None, parsed(*pinned, "../x", "--enable-prefix-adapters"))
    monkeypatch.setenv("PREFIX_SERVE_ALLOW_RUNTIME_UPDATING", "1")
    engine_config.configure(None, parsed(*pinned))
    with pytest.raises(PrefixServeError, match="must be up to 256 letters"):
        prefix_adapters(a="/x", prefix_adapter_pinned=["a", "../x"])


@pytest.mark.parametrize("gib", ["-1", "all", "inf", "nan"])
def test_malformed_memory(gib: str) -> None:
    message = f"expected a number of GiB >= 0, got '{gib}'"
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        cli_args.parse_gib(gib)
    with pytest.raises(PrefixServeError, match=f"`prefix_adapter_device_memory`: {message}"):
        prefix_adapters(a="/x", prefix_adapter_device_memory=gib)


def test_memory_offline() -> None:
    for gib in (0, 0.25, 2):
        merged = prefix_adapters({"a": "/x"}, prefix_adapter_device_memory=gib)["kv_transfer_config"]
        assert merged.get_from_extra_config("prefix_device_memory", None) == gib * 2**30
        assert [each["name"] for each in merged.kv_connector_extra_config["prefix_adapters"]] == ["a"]


def test_incomplete_or_conflicting_options_are_refused() -> None:
    for option in (
        ["--prefix-adapter-warmup"],
        ["--prefix-adapter-device-memory", "2"],
        ["--prefix-adapter-pinned", "a"],
    ):
        with pytest.raises(PrefixServeError, match=f"{option[0]} needs"):
            engine_config.configure(None, parsed(*option))
    options = parsed("--prefix-adapter", "a=/x")
    options.lora_modules = [LoRAModulePath("a", "/y")]
    with pytest.raises(PrefixServeError, match="'a' is already the name of a model"):
        engine_config.configure(None, options)


@pytest.mark.parametrize("served", [[], ["--prefix-adapter", "one=/x"]])
def test_a_prefix_in_lora_modules_is_served_as_one(model: Path, adapter: Path, served: list[str]) -> None:
    from vllm.engine.arg_utils import EngineArgs

    options = parsed(*served)
    vars(options).update(vars(EngineArgs(model=str(model))))
    fine, tone = LoRAModulePath("fine", "/lora"), LoRAModulePath("tone", str(adapter), "base")
    options.lora_modules = [fine, tone]
    args = EngineArgs.from_cli_args(options)
    assert options.lora_modules == [fine]
    named = settings_in(args.kv_transfer_config)["prefix_adapters"]
    assert [AdapterOption(**fields) for fields in named] == [
        *([AdapterOption("one", "/x")] if served else []),
        AdapterOption("tone", str(adapter), "base"),
    ]
    # The other processes of the server, which get the same options.
    assert settings_in(EngineArgs.from_cli_args(options).kv_transfer_config)["prefix_adapters"] == named
    options.lora_modules = [tone]
    with pytest.raises(PrefixServeError, match="'tone' is given twice"):
        EngineArgs.from_cli_args(options)
    assert options.lora_modules is None


def test_lora_modules_without_a_prefix_stay_with_vllm(model: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    options = parsed()
    vars(options).update(vars(EngineArgs(model=str(model))))
    options.lora_modules = [LoRAModulePath("fine", "/lora")]
    assert EngineArgs.from_cli_args(options).kv_transfer_config is None
    assert options.lora_modules == [LoRAModulePath("fine", "/lora")]


def test_where_adapters_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def settings_of(*options: str) -> dict[str, object]:
        found = settings_in(engine_config.configure(None, parsed(*options)))
        return {name: value for name, value in found.items() if name not in ("prefix_adapters", "prefix_registry")}

    folder, warmup = str(tmp_path), {"prefix_adapter_warmup": False}
    assert settings_of("--prefix-adapter-dir", folder, "s3://bucket/x", "--prefix-adapter-cache-size", "0.5") == {
        **warmup,
        "prefix_adapter_dir": [folder, "s3://bucket/x"],
        "prefix_adapter_cache_size": 2**29,
    }
    assert settings_of("--prefix-adapter-hub", "me", "you/x") == {**warmup, "prefix_adapter_hub": ["me", "you/x"]}
    with pytest.raises(PrefixServeError, match="is not a folder; create it"):
        settings_of("--prefix-adapter-dir", f"{folder}/nowhere")
    with pytest.raises(PrefixServeError, match="expects OWNER or OWNER/NAME"):
        settings_of("--prefix-adapter-hub", "a/b/c")
    # The folder of vLLM's own resolver, if that is on.
    monkeypatch.setenv("VLLM_LORA_RESOLVER_CACHE_DIR", folder)
    assert settings_of("--enable-prefix-adapters") == warmup
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    assert settings_of("--enable-prefix-adapters") == {**warmup, "prefix_adapter_dir": [folder]}
    assert settings_of("--prefix-adapter-dir", folder)["prefix_adapter_dir"] == [folder]
    monkeypatch.setenv("VLLM_LORA_RESOLVER_HF_REPO_LIST", "me/x,you/y")
    assert "prefix_adapter_hub" not in settings_of("--enable-prefix-adapters")
    monkeypatch.setenv("VLLM_PLUGINS", "prefix_adapters,lora_hf_hub_resolver")
    assert settings_of("--prefix-adapter-hub", "me/x")["prefix_adapter_hub"] == ["me/x", "you/y"]
    offline = prefix_adapters(prefix_adapter_dir=tmp_path, prefix_adapter_hub="me", prefix_adapter_cache_size=1)
    assert offline["kv_transfer_config"].kv_connector_extra_config == {
        "prefix_adapters": [],
        "prefix_adapter_dir": [folder],
        "prefix_adapter_hub": ["me"],
        "prefix_adapter_cache_size": 2**30,
    }


@pytest.mark.parametrize(("given", "warmed"), [([], True), (["a", "b"], ["a", "b"]), (None, False)])
def test_all_or_a_few_adapters_are_warmed_up(given: list[str] | None, warmed: object) -> None:
    option = [] if given is None else ["--prefix-adapter-warmup", *given]
    found = settings_in(engine_config.configure(None, parsed("--prefix-adapter", "a=/x", *option)))
    assert found["prefix_adapter_warmup"] == warmed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "serve"], "for `bench` type `vllm bench`."),
        (["collect-env"], "for `collect-env` type `vllm collect-env`."),
        (["serve", "model"], "`prefix-serve` is `vllm serve` already; leave out `serve`."),
    ],
)
def test_vllm_commands_are_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"\Aprefix-serve: error: [^\n]*\Z") as caught:
        prefix_serve.main(arguments)
    assert message in str(caught.value)
    # A folder of that name may hold a model.
    (tmp_path / arguments[0]).mkdir()
    assert prefix_serve._mistake(arguments) is None


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (
            "from vllm_plugin.prefix_serve import main; main(['model'])",
            "prefix-serve: error: vLLM is not installed; install",
        ),
        ("from vllm_plugin import prefix_adapters", "ImportError: vLLM is not installed; install"),
        ("from vllm_plugin import PrefixAdapterRequest", "ImportError: vLLM is not installed; install"),
    ],
)
def test_without_vllm(code: str, error: str) -> None:
    hide = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
# vLLM, and what comes with it alone.
hidden = ("vllm", "msgspec", "fastapi", "prometheus_client")
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in hidden else find(name, *rest)
"""
    done = subprocess.run([sys.executable, "-c", hide + code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(error)


def test_all_processes_of_a_server_have_one_registry(model: Path, adapter: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    more = ["--prefix-adapter-warmup", "--prefix-adapter-device-memory", "0.25"]
    options = parsed("--prefix-adapter", f"one={adapter}", *more)
    vars(options).update(vars(EngineArgs(model=str(model), skip_tokenizer_init=True, max_model_len=256)))
    first = EngineArgs.from_cli_args(options).create_engine_config()
    # Only the first process reads the adapter's folder.
    (adapter / "adapter_config.json").unlink()
    copy = pickle.loads(pickle.dumps(options))
    second = EngineArgs.from_cli_args(copy).create_engine_config()
    settings = [settings_in(each.kv_transfer_config) for each in (first, second)]
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
        "import pickle, sys; folder = pickle.loads(bytes.fromhex(sys.argv[1])); "
        "from vllm_plugin.patches import install; print(folder, type(folder).__name__, install._installed)"
    )
    command = [sys.executable, "-c", code, pickle.dumps(SharedFolder("/x")).hex()]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "/x SharedFolder True\n"
