"""Compiled prefixes act like their text in the prompt, and their chat template renders what follows an opening."""

from __future__ import annotations

import hashlib
import json
import warnings
from datetime import datetime

import pytest
import torch
from jinja2 import TemplateError
from peft import PeftModel
from transformers.utils import chat_template_utils

from helpers.chats import CHATML, LLAMA, tokenizer_with
from helpers.tiny import STATELESS, tiny_model, tiny_tokenizer
from helpers.tiny_seq2seq import tiny_encoder_decoder
from peft_prefix_ext.checkpoint import read_prefix
from peft_prefix_ext.cli import main
from peft_prefix_ext.distillation import chat_template
from peft_prefix_ext.distillation.compile import compile_context
from peft_prefix_ext.distillation.context import Context, chat_context, read_messages, read_text, text_context

VOCABULARY = {"vocab_size": 300}
OPENINGS = [
    [{"role": "system", "content": 'You {{ "speak" }} of {% food %} only. \U0001f35d {# yes #}\nIn short: \\n.'}],
    [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": "name: Aromi"},
        {"role": "assistant", "content": "Aromi serves Italian food."},
    ],
]


@torch.no_grad()
def greedy(model, ids):
    new = torch.tensor([ids])
    output = model.generate(
        input_ids=new, attention_mask=torch.ones_like(new), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_the_model_answers_as_after_the_text(architecture, tmp_path):
    tokenizer = tiny_tokenizer()
    texts = ["Aromi serves Italian food near the river. " * 3, "Its name means scents."]
    context = text_context(tokenizer, texts, ["a.txt", "b.txt"])
    base = tiny_model(architecture, **VOCABULARY)
    unchanged = tiny_model(architecture, **VOCABULARY)
    prefix = compile_context(base, context, tmp_path)
    assert prefix.num_virtual_tokens == len(context.token_ids)
    assert tokenizer.decode(context.token_ids) == "\n\n".join(texts)
    assert prefix.config["context"]["sources"]["b.txt"] == hashlib.sha256(texts[1].encode()).hexdigest()
    # The model is left as it was.
    assert {name for name, _ in base.named_modules()} == {name for name, _ in unchanged.named_modules()}
    question = tokenizer("What is Aromi?", add_special_tokens=False).input_ids
    expected = greedy(unchanged, [*context.token_ids, *question])
    assert greedy(base, question) != expected
    assert greedy(PeftModel.from_pretrained(base, tmp_path).eval(), question) == expected


@pytest.mark.parametrize("messages", OPENINGS, ids=["system", "examples"])
@pytest.mark.parametrize("template", [CHATML, LLAMA], ids=["chatml", "llama"])
def test_a_chat_goes_on_after_its_opening(template, messages, tmp_path):
    tokenizer = tokenizer_with(template)
    context = chat_context(tokenizer, messages)
    base = tiny_model("llama", vocab_size=len(tokenizer))
    prefix = compile_context(base, context, tmp_path)
    own = prefix.chat_template
    turns = [
        {"role": "user", "content": " What is it?\n"},
        {"role": "assistant", "content": "A {{ place }}."},
        {"role": "user", "content": "And {% where %}?"},
    ]
    for number in (1, 3):
        whole = tokenizer.apply_chat_template([*messages, *turns[:number]], add_generation_prompt=True).input_ids
        after = tokenizer.apply_chat_template(turns[:number], chat_template=own, add_generation_prompt=True).input_ids
        assert [*context.token_ids, *after] == whole
        # With the model's own template something would stand there twice.
        assert tokenizer.apply_chat_template(turns[:number], add_generation_prompt=True).input_ids != after
    with torch.no_grad():
        expected = base(torch.tensor([whole])).logits[:, len(context.token_ids) :]
        got = PeftModel.from_pretrained(base, tmp_path).eval()(torch.tensor([after])).logits
    assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_what_would_change_the_opening_is_refused():
    """Tools stand in the system message of most templates, which the prefix has without them."""
    tokenizer = tokenizer_with("{{ tools | length if tools }}" + CHATML)
    context = chat_context(tokenizer, OPENINGS[0])
    question = [{"role": "user", "content": "What is it?"}]
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    assert tokenizer.apply_chat_template(question, chat_template=context.chat_template, tokenize=False)
    with pytest.raises(TemplateError, match="which tools or other arguments of the chat template would change"):
        tokenizer.apply_chat_template(question, tools=[tool], chat_template=context.chat_template, tokenize=False)


def test_the_date_is_that_of_the_day_when_it_was_compiled(monkeypatch):
    dated = "{{ '<|start|>' + strftime_now('%d %B %Y') + ' ' + strftime_now('%H') + '<|eot|>' }}" + CHATML

    class Clock(datetime):
        day = 1

        @classmethod
        def now(cls, tz=None):
            return cls(2026, 5, cls.day, 12, tzinfo=tz)

    for module in (chat_template, chat_template_utils):
        monkeypatch.setattr(module, "datetime", Clock)
    tokenizer = tokenizer_with(dated)
    question = [{"role": "user", "content": "What is it?"}]
    whole = tokenizer.apply_chat_template([*OPENINGS[0], *question], add_generation_prompt=True).input_ids
    context = chat_context(tokenizer, OPENINGS[0])
    assert "01 May 2026 12" in tokenizer.decode(context.token_ids)
    monkeypatch.setattr(Clock, "day", 2)
    assert "02 May" in tokenizer.apply_chat_template(question, tokenize=False)
    after = tokenizer.apply_chat_template(question, chat_template=context.chat_template, add_generation_prompt=True)
    assert [*context.token_ids, *after.input_ids] == whole
    # It is the same context on the next day.
    assert chat_context(tokenizer, OPENINGS[0]).token_ids != context.token_ids
    assert chat_context(tokenizer, OPENINGS[0]).digest == context.digest != chat_context(tokenizer, OPENINGS[1]).digest


def test_a_text_takes_the_place_of_a_chat(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    base = tiny_model("llama", vocab_size=len(tokenizer))
    compile_context(base, chat_context(tokenizer, OPENINGS[0]), tmp_path)
    assert read_prefix(tmp_path).chat_template
    assert compile_context(base, text_context(tokenizer, ["Aromi"]), tmp_path).chat_template is None


def test_the_template_goes_where_the_adapter_goes(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    base = tiny_model("llama", vocab_size=len(tokenizer))
    prefix = compile_context(base, chat_context(tokenizer, OPENINGS[0]), tmp_path / "first")
    PeftModel.from_pretrained(base, tmp_path / "first", is_trainable=True).save_pretrained(tmp_path / "second")
    assert read_prefix(tmp_path / "second").chat_template == prefix.chat_template


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, OPENINGS[0], "`messages` cannot be rendered by the tokenizer's chat template"),
        (CHATML, [], "The chat is empty"),
        (CHATML, [{"role": "system", "content": " "}], "The chat is empty"),
        # Like Llama 2's, which writes the system message into the user's turn.
        (
            "{% for m in messages %}{% if m.role == 'system' %}{% if loop.last %}<<{{ m.content }}>>{% endif %}"
            "{% else %}[{{ messages[0].content }} {{ m.content }}]{% endif %}{% endfor %}",
            OPENINGS[0],
            "renders these messages differently when a question follows",
        ),
        (
            "{% for m in messages %}{{ m.content }}{{ loop.length if loop.last }}{% endfor %}",
            OPENINGS[1],
            "renders these messages differently when a question follows",
        ),
    ],
)
def test_chats_that_no_prefix_can_stand_for_are_refused(template, messages, message):
    with pytest.raises(ValueError, match=message):
        chat_context(tokenizer_with(template), messages)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *(
            (name, "do not start from states that they are given, so the prefix of a text is not the text")
            for name in STATELESS
        ),
        ("t5", "reads its text in an encoder, where no prefix can stand for it"),
    ],
)
def test_models_whose_prefix_is_not_the_text_are_refused(name, message, tmp_path):
    base = tiny_encoder_decoder(name) if name == "t5" else tiny_model(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(ValueError, match=f"{message}: train a prefix instead"):
            compile_context(base, Context([3, 4, 5]), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not any("prefix_ext" in module for module, _ in base.named_modules())


@pytest.mark.parametrize("texts", [[], [""], ["Aromi", " \n"]])
def test_an_empty_text_is_refused(texts):
    with pytest.raises(ValueError, match="is empty: give a text"):
        text_context(tiny_tokenizer(), texts)


def test_sources(tmp_path):
    (tmp_path / "a.txt").write_text("Aromi", encoding="utf-8")
    (tmp_path / "chat.json").write_text(json.dumps({"messages": OPENINGS[1]}))
    (tmp_path / "other.json").write_text('{"text": "Aromi"}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    assert read_text(tmp_path / "a.txt") == "Aromi"
    assert read_messages(tmp_path / "chat.json") == OPENINGS[1]
    for name, message in {
        "other.json": "must hold messages",
        "broken.json": "is not JSON",
        "latin.txt": "not a text in UTF-8",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_messages(tmp_path / name)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = tokenizer_with(CHATML)
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained("base")
    tokenizer.save_pretrained("base")
    (tmp_path / "handbook.txt").write_text("Aromi serves Italian food.", encoding="utf-8")
    main(["compile", "handbook.txt", "--base", "base", "--out", "handbook", "--system"])
    out = capsys.readouterr().out
    config = json.loads((tmp_path / "handbook" / "adapter_config.json").read_text())
    count = config["num_virtual_tokens"]
    assert f"{count} virtual tokens" in out
    assert f"saves       {count} tokens to send, tokenize and prefill in each request" in out
    context = config["context"]
    assert context["chat_template"]
    assert context["chat_template_sha256"] == hashlib.sha256(CHATML.encode()).hexdigest()
    assert context["sources"] == {"handbook.txt": hashlib.sha256(b"Aromi serves Italian food.").hexdigest()}

    def refused(message, *arguments):
        with pytest.raises(SystemExit) as raised:
            main(["compile", *arguments, "--base", "base", "--out", "new"])
        assert raised.value.code in (1, 2)
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()

    refused("nothing.txt", "nothing.txt")
    (tmp_path / "empty.txt").write_text(" ")
    refused("empty.txt is empty", "empty.txt")
    (tmp_path / "chat.json").write_text(json.dumps(OPENINGS[0]))
    refused("a .json file is a whole chat", "chat.json", "--system")
    refused("a .json file is a whole chat", "chat.json", "empty.txt")
    refused("There is no tokenizer at 'nowhere'", "handbook.txt", "--tokenizer", "nowhere")
    (tmp_path / "long.txt").write_text("Aromi serves Italian food. " * 200)
    refused("512", "long.txt")
