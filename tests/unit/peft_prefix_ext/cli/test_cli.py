"""`prefix-ext`: each command on real adapters, its output and its exit code."""

from __future__ import annotations

import hashlib
import json
import logging as python_logging
import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from helpers.prefixed import with_prefix
from helpers.tiny import tiny_model, tiny_tokenizer
from peft_prefix_ext import read_prefix, write_prefix
from peft_prefix_ext.checkpoint.format import LayerKV
from peft_prefix_ext.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, a prefix of ours and one of stock PEFT's for it, and another base."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model("llama").save_pretrained(folder / "base")
    tiny_model("llama", num_hidden_layers=2).save_pretrained(folder / "smaller")
    with_prefix(tiny_model("llama"), num_frozen_tokens=2).save_pretrained(folder / "ours")
    stock = get_peft_model(tiny_model("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    stock.save_pretrained(folder / "stock")
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs a command in `folder`; returns its exit code and what it printed."""
    monkeypatch.chdir(folder)
    verbosity = logging.get_verbosity()

    def run(*arguments):
        try:
            main(arguments)
            code = 0
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    yield run
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def refused(run, message, *arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith(f"prefix-ext {arguments[0]}: error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(("path", "peft_type"), [("ours", "PREFIX_EXT"), ("stock", "PREFIX_TUNING")])
def test_inspect(run, folder, path, peft_type):
    code, out, err = run("inspect", path)
    prefix = read_prefix(folder / path)
    assert (code, err) == (0, "")
    assert out.startswith(f"{path}\n  type        {peft_type}, task type CAUSAL_LM\n")
    assert f"{prefix.num_virtual_tokens} virtual tokens" in out
    assert f"layers      0-2: keys [2, {prefix.num_virtual_tokens}, 16]" in out
    code, out, err = run("inspect", path, "--json")
    facts = json.loads(out)
    assert (code, facts["peft_type"], facts["digest"]) == (0, peft_type, prefix.digest)
    assert facts["num_bytes"] == prefix.num_bytes
    layer = facts["layers"][1]
    assert (layer["index"], layer["module"]) == (1, "model.layers.1.self_attn" if path == "ours" else None)
    assert layer["key_norm"] == pytest.approx(float(prefix.layers[1].key.norm(dim=-1).mean()), abs=1e-3)


def test_export_import_compose_verify(run, folder):
    """The way there and back: nothing is lost, and every result is right for the base."""
    for arguments in (
        ("export", "ours", "out/stock"),
        ("export", "ours", "out/cartridge", "--type", "CARTRIDGE"),
        ("import", "out/stock", "out/again", "--base", "base"),
        ("compose", "ours", "stock", "--out", "out/both"),
        ("compose", "stock", "ours", "--out", "out/shifted", "--positions", "shift", "--base", "base"),
    ):
        code, out, err = run(*arguments)
        assert (code, err) == (0, "")
        assert "virtual tokens" in out
        assert ("trained apart collapse behind one another" in out) == (arguments[0] == "compose")
    assert read_prefix(folder / "out/again").digest == read_prefix(folder / "ours").digest
    assert read_prefix(folder / "out/cartridge").config["num_frozen_tokens"] == 2
    assert read_prefix(folder / "out/both").num_virtual_tokens == 12
    for path in ("ours", "stock", "out/stock", "out/cartridge", "out/again", "out/both", "out/shifted"):
        code, out, err = run("verify", path, "--base", "base")
        assert (code, err) == (0, "")
        assert [line[:4] for line in out.splitlines()] == ["ok  "] * 4
    assert torch.isfinite(
        PeftModel.from_pretrained(tiny_model("llama"), folder / "out/both")(torch.ones(1, 3, dtype=torch.long)).logits
    ).all()


def test_one_prefix_alone_stands_behind_none(run, tmp_path):
    code, out, err = run("compose", "ours", "--out", str(tmp_path / "one"))
    assert (code, err) == (0, "")
    assert "collapse" not in out


def test_errors_are_one_sentence(run, folder, tmp_path):
    refused(run, "neither a folder nor a Hub repository", "inspect", "/nowhere/at/all")
    refused(run, "No adapter_config.json", "inspect", "base")
    refused(run, "The base model 'nowhere' cannot be loaded", "import", "stock", "out/x", "--base", "nowhere")
    refused(run, "is PREFIX_EXT already", "import", "ours", "out/x", "--base", "base")
    refused(run, "`base_model` (`--base`) must be given", "compose", "stock", "--out", "out/x")
    refused(run, "layer 2 has keys and values", "import", "stock", "out/x", "--base", "smaller")
    prefix = read_prefix(folder / "ours")
    mixed = {0: LayerKV(*torch.ones(2, 2, 3, 8)), 1: LayerKV(*torch.ones(2, 1, 3, 8))}
    write_prefix(tmp_path / "mixed", mixed, prefix.modules, task_type="CAUSAL_LM")
    refused(run, "knows one shape for all layers", "export", str(tmp_path / "mixed"), "out/x")
    write_prefix(tmp_path / "taskless", prefix.layers, prefix.modules)
    refused(run, "`task_type` must be given", "export", str(tmp_path / "taskless"), "out/x")
    assert run("export", str(tmp_path / "taskless"), str(tmp_path / "x"), "--task-type", "CAUSAL_LM")[0] == 0
    assert not (folder / "out/x").exists()


def test_other_files_are_not_overwritten(run, folder, tmp_path):
    """An adapter of the same type is replaced; one of another type, a model, a file are not."""
    out = str(tmp_path / "stock")
    assert run("import", "stock", str(tmp_path / "imported"), "--base", "base")[0] == 0
    for source in ("ours", str(tmp_path / "imported")):
        code, _, err = run("export", source, out)
        assert (code, err) == (0, "")
    assert read_prefix(out).num_virtual_tokens == 5
    (tmp_path / "stock" / "notes.md").write_text("mine")
    before = read_prefix(out).digest
    refused(run, "an adapter of type PREFIX_TUNING, which would be lost", "export", "ours", out, "--type", "CARTRIDGE")
    refused(run, "an adapter of type PREFIX_EXT, which would be lost", "export", "ours", "ours")
    refused(run, "an adapter of type PREFIX_TUNING, which would be lost", "compose", "ours", "--out", out)
    refused(run, "an adapter of type PREFIX_TUNING", "import", "stock", out, "--base", "nowhere")
    lora = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    refused(run, "an adapter of type LORA, which would be lost", "export", "ours", str(tmp_path / "lora"))
    refused(run, "base holds a model: name another folder", "export", "ours", "base")
    (tmp_path / "file").write_text("")
    refused(run, "file is a file: name a folder", "export", "ours", str(tmp_path / "file"))
    (tmp_path / "stock" / "adapter_config.json").write_text("[")
    refused(run, "that cannot be read: name another folder, or remove this one", "export", "ours", out)
    assert sorted(path.name for path in (tmp_path / "stock").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "notes.md",
    ]
    assert hashlib.sha256((tmp_path / "stock" / "adapter_model.safetensors").read_bytes()).hexdigest() == before


def fails(run, message, *arguments):
    """The checks before the one that fails are said to be right."""
    code, out, err = run(*arguments)
    assert code == 1
    assert all(line.startswith("ok  ") for line in out.splitlines())
    assert message in err


def test_verify_finds_what_is_wrong(run, folder, tmp_path):
    prefix = read_prefix(folder / "ours")

    def altered(name, change):
        layers = {index: LayerKV(*(state.clone() for state in kv)) for index, kv in prefix.layers.items()}
        change(layers)
        write_prefix(tmp_path / name, layers, prefix.modules, base_fingerprint=prefix.base_fingerprint)
        return str(tmp_path / name)

    fails(run, "num_hidden_layers is 3 in the adapter and 2 in the model", "verify", "ours", "--base", "smaller")
    fails(run, "layer 2 has keys and values", "verify", "stock", "--base", "smaller")
    huge = altered("huge", lambda layers: layers[2].value.fill_(3e38))
    fails(run, "the logits are NaN or Inf", "verify", huge, "--base", "base")
    missing = altered("missing", lambda layers: layers.pop(1))
    fails(run, "layer 1 has keys and values None in the adapter", "verify", missing, "--base", "base")
    weights = tmp_path / "huge" / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[:] = float("nan")
    save_file(tensors, weights)
    fails(run, "holds NaN or Inf", "verify", huge, "--base", "base")


def test_verify_warns_of_what_has_changed_since_a_prefix_was_compiled(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }};{% endfor %}"
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained("base")
    tokenizer.save_pretrained("base")
    chat, rules, facts = (tmp_path / name for name in ("chat.json", "rules.txt", "facts.txt"))
    chat.write_text(json.dumps([{"role": "system", "content": "Answer."}]))
    rules.write_text("Answer in one sentence.\n")
    facts.write_text("Aromi serves Italian food.")
    adapters = {"chat": ["chat.json"], "system": ["rules.txt", "facts.txt", "--system"], "text": ["facts.txt"]}
    for name, arguments in adapters.items():
        assert run("compile", *arguments, "--base", "base", "--out", name)[0] == 0

    def warnings_of(name):
        code, out, err = run("verify", name, "--base", "base")
        assert code == 0
        assert [line[:4] for line in out.splitlines()] == ["ok  "] * 4
        assert all(line.startswith("prefix-ext: warning: ") for line in err.splitlines())
        return [line.removeprefix("prefix-ext: warning: ") for line in err.splitlines()]

    assert {name: warnings_of(name) for name in adapters} == {"chat": [], "system": [], "text": []}
    chat.write_text("[]")
    rules.write_bytes(b"Answer in one sentence.\r\n")  # as another system writes it
    facts.write_text("Aromi serves French food.")
    assert [line.partition(" has changed since")[0] for line in warnings_of("chat")] == ["chat.json"]
    changed = "facts.txt has changed since the prefix in {} was made from it: make the prefix again if it should know the new text."
    for name in ("system", "text"):
        assert warnings_of(name) == [changed.format(name)]
    # What is gone says nothing.
    for source in (chat, rules, facts):
        source.unlink()
    assert warnings_of("system") == []
    tokenizer.chat_template += "{{ '' }}"
    tokenizer.save_pretrained("base")
    for name in ("chat", "system"):
        (line,) = warnings_of(name)
        assert line.startswith("The tokenizer of base has another chat template than the one that the prefix in")
    assert warnings_of("text") == []
    for file in (tmp_path / "base").glob("*token*"):
        file.unlink()
    (tmp_path / "base" / "chat_template.jinja").unlink()
    assert warnings_of("chat") == []


def test_warnings_are_one_line(run, folder, tmp_path):
    prefix = read_prefix(folder / "ours")
    for name in ("one", "two"):
        write_prefix(tmp_path / name, prefix.layers, prefix.modules, base_model_name_or_path=f"owner/{name}")
    code, _, err = run("compose", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "both"))
    assert code == 0
    assert err.startswith("prefix-ext: warning: The prefixes were trained on owner/one and owner/two")
    assert err.count("\n") == 1


def test_only_own_warnings_are_shown(run, monkeypatch, caplog):
    """The libraries that a command imports have much to say, on the very machines where it matters least."""

    library = python_logging.getLogger("library")

    def noisy(arguments):
        library.warning("Failed to load another library")
        warnings.warn_explicit("of theirs", UserWarning, "theirs.py", 1, module="transformers.utils")
        warnings.warn_explicit("of ours", UserWarning, "ours.py", 1, module="peft_prefix_ext.checkpoint.compatibility")
        library.error("out of memory")

    monkeypatch.setattr("peft_prefix_ext.cli.inspect.run", noisy)
    before = python_logging.root.manager.disable
    assert run("inspect", "ours") == (0, "", "prefix-ext: warning: of ours\n")
    assert caplog.messages == ["out of memory"]
    assert python_logging.root.manager.disable == before


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("inspect",),
        ("train", "ours"),
        ("verify", "ours"),
        ("compose", "ours", "--out", "out/x", "--positions", "shift"),
        ("export", "ours", "out/x", "--type", "LORA"),
    ],
)
def test_wrong_usage_is_2(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: prefix-ext")


def test_as_a_module_and_without_heavy_imports(folder):
    def ask(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "peft_prefix_ext", *arguments], cwd=folder, capture_output=True, text=True
        )

    assert "exit codes: 0" in ask("compose", "--help").stdout
    verified = ask("verify", "ours", "--base", "base")
    assert (verified.returncode, verified.stderr) == (0, "")
    done = ask("inspect", "nowhere/at-all")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    code = (
        "import sys; from peft_prefix_ext.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'peft', 'transformers', 'vllm'} & sys.modules.keys()))"
    )
    for arguments, imported in ((["--help"], "[]"), (["inspect", "ours"], "['torch']")):
        done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == imported, done.stderr
