"""`prefix-ext evaluate` and `prefix-ext chat` on an adapter that `prefix-ext train` made."""

from __future__ import annotations

import io
import json
import sys

import pytest
from transformers import AutoModelForCausalLM

from helpers.distillation import chat_model, chatml_tokenizer
from peft_prefix_ext.cli import main

ROWS = [{"prompt": f"say {index % 5} =>", "completion": " Aromi serves Italian food"} for index in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = chatml_tokenizer()
    tokenizer.eos_token = "<|im_end|>"
    model = chat_model(tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    options = "--num-virtual-tokens 8 --use_cpu --disable_tqdm true --max_steps 120 --learning_rate 0.02 --held-out 5"
    options += " --num-samples 0 --per_device_eval_batch_size 5"
    files = [str(folder / name) for name in ("data.jsonl", "base", "out")]
    main(["train", files[0], "--model", files[1], "--out", files[2], *options.split()])
    return folder


def evaluated(folder, *arguments):
    main(["evaluate", str(folder / "out"), *map(str, arguments), "--json", str(folder / "scores.json")])
    return json.loads((folder / "scores.json").read_text())


def test_the_metrics_of_prefix_and_base(folder, capsys):
    scores = evaluated(folder, folder / "data.jsonl", "--max-new-tokens", "24")
    printed = capsys.readouterr().out
    assert list(scores) == ["base model", "prefix"]
    base, prefix = scores.values()
    assert list(prefix) == ["loss", "exact_match", "bleu", "rouge_l"]
    assert base["exact_match"] == 0
    assert prefix["exact_match"] >= 20
    assert prefix["loss"] < base["loss"] - 2
    assert prefix["bleu"] > base["bleu"] + 20
    assert prefix["rouge_l"] > base["rouge_l"] + 20
    assert f"{prefix['loss']:.4f}" in printed.splitlines()[-1]


def test_the_loss_is_the_one_of_the_training(folder, tmp_path):
    trained = json.loads((folder / "out" / "training.json").read_text())["held_out_loss"]
    from peft_prefix_ext.training.dataset import read_examples

    held_out = read_examples(str(folder / "data.jsonl"), held_out=5, seed=42).held_out
    (tmp_path / "held-out.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in held_out))
    scores = evaluated(folder, tmp_path / "held-out.jsonl", "--metrics", "loss")
    assert scores["prefix"]["loss"] == pytest.approx(trained["trained"], abs=1e-3)
    assert scores["base model"]["loss"] == pytest.approx(trained["base"], abs=1e-3)


def test_some_rows_and_no_base(folder):
    scores = evaluated(folder, folder / "data.jsonl", "--limit", "5", "--no-base", "--metrics", "exact_match")
    assert list(scores) == ["prefix"]
    assert scores["prefix"]["exact_match"] % 20 == pytest.approx(0)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give a data set, or --tasks"),
        (["data.jsonl", "--limit", "0"], 2, "--limit must be at least 1, got 0"),
        (["none.jsonl"], 1, "There is no data set at 'none.jsonl'"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, code, message, folder, capsys):
    with pytest.raises(SystemExit, match=str(code)):
        main(["evaluate", str(folder / "out"), *arguments])
    assert message in capsys.readouterr().err.splitlines()[-1]


def chat(folder, monkeypatch, capsys, *lines):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    capsys.readouterr()
    main(["chat", str(folder / "out"), "--max-new-tokens", "16"])
    return capsys.readouterr().out.splitlines()


def test_a_chat_answers_each_line(folder, monkeypatch, capsys):
    first, again, note, without = chat(folder, monkeypatch, capsys, "say 3", "/new", "say 3", "/new", "/base", "say 3")
    assert first == again != without
    assert note == "(the prefix is off)"


def test_a_chat_remembers(folder, monkeypatch, capsys):
    _, second = chat(folder, monkeypatch, capsys, "say 3", "say 4")
    (alone,) = chat(folder, monkeypatch, capsys, "say 4", "/exit", "say 5")
    assert second != alone


def test_a_prefix_that_stands_for_an_opening_brings_its_template(folder, tmp_path, monkeypatch, capsys):
    """The chat goes on behind the opening, which does not come a second time."""
    (tmp_path / "opening.txt").write_text("Describe it.")
    main(
        [
            "compile",
            str(tmp_path / "opening.txt"),
            "--system",
            "--base",
            str(folder / "base"),
            "--out",
            str(tmp_path / "out"),
        ]
    )
    answer = "\n".join(chat(tmp_path, monkeypatch, capsys, "say 3"))
    tokenizer, base = chatml_tokenizer(), AutoModelForCausalLM.from_pretrained(folder / "base")
    messages = [{"role": "system", "content": "Describe it."}, {"role": "user", "content": "say 3"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    tokens = base.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert answer.split() == tokenizer.decode(tokens, skip_special_tokens=True).split()
    assert answer.split() != "\n".join(chat(folder, monkeypatch, capsys, "/base", "say 3")[1:]).split()
