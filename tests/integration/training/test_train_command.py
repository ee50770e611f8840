"""`prefix-ext train`: from a file of rows to an adapter, and on from where it stopped."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.distillation import chat_model, chatml_tokenizer
from peft_prefix_ext import PrefixExtConfig
from peft_prefix_ext.cli import main

ROWS = [
    {"messages": [{"role": "user", "content": f"say {index % 7}"}, {"role": "assistant", "content": "Aromi serves"}]}
    for index in range(40)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = chatml_tokenizer()
    tokenizer.eos_token = "<|im_end|>"
    chat_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return path


def words(data, base, out, *more):
    fixed = ["--num-virtual-tokens", "8", "--disable_tqdm", "true", "--max-new-tokens", "4"]
    return list(map(str, ["train", data, "--model", base, "--out", out, *fixed, *more]))


def test_rows_become_an_adapter(data, base, tmp_path, capfd):
    out = tmp_path / "restaurant"
    main(words(data, base, out, "--max_steps", "30", "--learning_rate", "0.02"))
    printed = capfd.readouterr().out
    report = json.loads((out / "training.json").read_text())
    losses = report["held_out_loss"]
    assert losses["trained"] < losses["start"] - 0.5
    assert losses["trained"] < losses["base"] - 0.5
    assert (report["num_train"], report["num_held_out"], len(report["samples"])) == (36, 4, 3)
    assert {sample["expected"] for sample in report["samples"]} == {"Aromi serves"}
    assert (out / "training.png").stat().st_size > 1000
    card = (out / "README.md").read_text()
    assert f"| trained | {losses['trained']:.4f} |" in card
    assert "## Prefix `default`" in card
    serve, ask = (shlex.split(line) for line in printed.strip().splitlines()[-3::2])
    assert serve == ["prefix-serve", str(base), "--prefix-adapter", f"restaurant={out}"]
    assert ask[:2] == ["curl", "http://localhost:8000/v1/chat/completions"]
    assert json.loads(ask[-1])["model"] == "restaurant"
    # The loss is that of the saved adapter.
    config = PrefixExtConfig.from_pretrained(out)
    assert "exemplars" in config.init_report
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(out)).eval()
    tokenizer = chatml_tokenizer()
    prompt = tokenizer.apply_chat_template(ROWS[0]["messages"][:1], tokenize=False, add_generation_prompt=True)
    answer = tokenizer("Aromi serves<|im_end|>\n").input_ids
    ids = torch.tensor([tokenizer(prompt).input_ids + answer])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
    loss = -logprobs.gather(1, torch.tensor(answer)[:, None]).mean()
    assert abs(float(loss) - losses["trained"]) < 0.3


def test_a_quantized_base_with_a_paged_optimizer(data, base, tmp_path, capfd):
    """QLoRA's recipe, at its learning rate, which is raised for a prefix."""
    options = ("--load-in-4bit", "--optim", "paged_adamw_8bit", "--learning_rate", "2e-4", "--gradient_checkpointing")
    main(words(data, base, tmp_path / "out", *options, "--max_steps", "30", "--num-samples", "0"))
    losses = json.loads((tmp_path / "out" / "training.json").read_text())["held_out_loss"]
    assert losses["trained"] < losses["start"] - 0.5
    prefix = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in prefix.values()} == {torch.float32}


def test_a_killed_training_ends_at_the_same_adapter(data, base, tmp_path):
    options = ("--max_steps", "12", "--eval_steps", "4", "--save_steps", "4", "--num-samples", "0")
    main(words(data, base, tmp_path / "whole", *options))
    kill = "import os; from transformers import Trainer; step = Trainer.training_step\n"
    kill += "def counted(self, *args, **kwargs):\n    if self.state.global_step == 10: os._exit(9)\n"
    kill += "    return step(self, *args, **kwargs)\n"
    kill += "Trainer.training_step = counted\nfrom peft_prefix_ext.cli import main\nmain(__import__('sys').argv[1:])"
    command = [sys.executable, "-c", kill, *words(data, base, tmp_path / "killed", *options)]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == 9
    assert sorted(path.name for path in (tmp_path / "killed-work" / "checkpoints").glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-8",
    ]
    main(words(data, base, tmp_path / "killed", *options))
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5)


def test_two_processes_train_the_adapter_of_one(data, base, tmp_path):
    # Adam divides by the size of a gradient: an epsilon that hides none lets rounding decide over the smallest.
    options = ("--max_steps", "4", "--adam_epsilon", "1e-3", "--num-samples", "2")
    options += ("--train_sampling_strategy", "sequential", "--per_device_train_batch_size")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "peft_prefix_ext.cli.train")
    together = words(data, base, tmp_path / "together", *options, "2")[1:]
    done = subprocess.run([sys.executable, *launch, *together], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("Serve it, and ask it:") == 1
    main(words(data, base, tmp_path / "alone", *options, "4"))
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "together"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-3)


def test_prompts_whose_last_token_merges_with_the_answer(base, tmp_path, capsys):
    rows = [{"prompt": f"say {index} => ", "completion": "Aromi serves"} for index in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    main(words(tmp_path / "data.jsonl", base, tmp_path / "out", "--max_steps", "2"))
    assert "In 7 of 7 examples the end of the prompt has other tokens" in capsys.readouterr().err


def test_other_settings_need_another_folder(data, base, tmp_path, capsys):
    options = ("--max_steps", "2", "--num-samples", "0")
    main(words(data, base, tmp_path / "out", *options))
    main(words(data, base, tmp_path / "out", *options, "--logging_steps", "2"))  # on which nothing depends
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1"):
        main(words(data, base, tmp_path / "out", *options, "--learning_rate", "0.1"))
    assert "made from other inputs (learning_rate): name another folder" in capsys.readouterr().err


def test_a_config_file_is_overridden_by_the_command_line(data, base, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"data: {data}\nmodel: {base}\nout: {tmp_path / 'out'}\nnum_virtual_tokens: 4\nreparam: none\n"
        "max_steps: 2\nlearning_rate: 1e-2\nuse_cpu: true\nnum-samples: 0\nseed: 7\n"
    )
    main(["train", "--config", str(config), "--num-virtual-tokens", "6"])
    saved = PrefixExtConfig.from_pretrained(tmp_path / "out")
    assert (saved.num_virtual_tokens, saved.reparam) == (6, "none")
    inputs = json.loads((tmp_path / "out-work" / "inputs.json").read_text())
    assert (inputs["learning_rate"], inputs["seed"], inputs["max_steps"]) == (0.01, 7, 2)
    config.write_text("dta: x\n")
    with pytest.raises(SystemExit, match="1"):
        main(["train", "--config", str(config)])
    assert "keys that are no arguments: dta" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--lerning_rate", "1"], 2, "unrecognized arguments: --lerning_rate 1"),
        (["--num-virtual-tokens", "0"], 1, "`num_virtual_tokens` must be an integer >= 1, got 0"),
        (["--init", "text"], 1, "`init` is 'text', so give `init_text`"),
        (["--prefix-args", "{"], 1, "`prefix_args` must be fields of PrefixExtConfig as JSON"),
        (["--prefix-args", '{"length": 3}'], 1, "`prefix_args` must be fields of PrefixExtConfig as JSON"),
        (["--columns", "prompt=question"], 1, "has no column 'question', only messages"),
        (["--held-out", "0"], 1, "`held_out` must be > 0"),
    ],
)
def test_a_mistake_is_one_sentence(more, code, message, data, base, tmp_path, capsys):
    with pytest.raises(SystemExit, match=str(code)):
        main(words(data, base, tmp_path / "out", *more))
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_base_model_that_is_not_there(data, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(words(data, tmp_path / "none", tmp_path / "out"))
    assert "There is no base model with a tokenizer at" in capsys.readouterr().err


WITHOUT_TRL = """
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.partition(".")[0] == "trl" else find(name, *rest))

from peft_prefix_ext.cli import main

main(["train", "data.jsonl", "--model", "base", "--out", "out"])
"""


def test_without_trl_it_says_what_to_install():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRL], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "prefix-ext train: error: TRL is not installed; install the extra `train`."
