"""The report stage as a whole, on a tiny model whose teacher and whose nothing are known."""

from __future__ import annotations

import pytest

from helpers.chats import DEFAULT_SYSTEM
from helpers.distillation import TEXT, chat_generator, chat_model, chatml_tokenizer, questions
from peft_prefix_ext.distillation.compile import compile_context
from peft_prefix_ext.distillation.context import chat_context
from peft_prefix_ext.distillation.reporting.answers import references_of
from peft_prefix_ext.distillation.reporting.evaluation import evaluate

OPTIONS = {"max_new_tokens": 8, "num_requests": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return chatml_tokenizer()


@pytest.fixture(scope="module")
def context(tokenizer):
    return chat_context(tokenizer, [{"role": "system", "content": TEXT}])


@pytest.fixture(scope="module")
def folders(tokenizer, context, tmp_path_factory):
    """The whole context, and a prefix that is no context: what the template writes by itself."""
    path = tmp_path_factory.mktemp("prefixes")
    nothing = chat_context(tokenizer, [{"role": "system", "content": DEFAULT_SYSTEM}])
    other = chat_context(tokenizer, [{"role": "system", "content": DEFAULT_SYSTEM[::-1]}])
    for name, each in {"teacher": context, "nothing": nothing, "other": other}.items():
        compile_context(chat_model(tokenizer), each, path / name)
    return path


@pytest.fixture
def generator(tokenizer, folders):
    made = chat_generator(tokenizer)
    made.add_prefix("teacher", folders / "teacher")
    return made


def test_the_teacher_recovers_all(generator, tokenizer, context, folders):
    report = evaluate(
        generator,
        tokenizer,
        context,
        questions(8),
        {"prefix": [folders / "teacher"] * 2},
        seconds_spent=5.0,
        settings={"steps": 3},
        **OPTIONS,
    )
    nothing, full, *_, prefix = report.rows
    assert (nothing.name, full.name, prefix.name) == ("nothing", "full context", "prefix")
    assert full.num_tokens == prefix.num_tokens == len(context.token_ids)
    assert full.scores == [1.0]  # its own answers are the references
    assert report.num_own_references == 8
    assert prefix.answers == full.answers == report.references != nothing.answers
    assert report.recovered_shares(prefix) == [1.0, 1.0]
    assert report.recovered_logprob_shares(prefix) == pytest.approx([1.0, 1.0])
    assert report.recovered_shares(nothing) == [0.0]
    assert report.drift["prefix"][0].logprob_difference == pytest.approx(
        report.drift["full context"][0].logprob_difference
    )
    assert report.settings == {"seed": 0, "longest answer": "8 tokens", "steps": 3}
    assert set(report.sources) == {"messages", "chat template"}
    text, cached, short = report.costs
    assert text.num_tokens == cached.num_tokens == short.num_tokens
    assert text.num_bytes == cached.num_bytes == short.num_bytes
    assert all(cost.first_token_seconds > 0 and cost.tokens_per_second > 0 for cost in report.costs)


def test_a_prefix_of_no_context_recovers_nothing(generator, tokenizer, context, folders):
    report = evaluate(
        generator,
        tokenizer,
        context,
        questions(8),
        {"nothing, compiled": [folders / "nothing"], "prefix": [folders / "nothing", folders / "other"]},
        **OPTIONS,
    )
    nothing, full, *baselines, compiled, prefix = report.rows
    assert compiled.num_tokens == nothing.num_tokens < full.num_tokens
    assert compiled.answers == nothing.answers
    assert report.recovered_shares(compiled) == pytest.approx([0.0])
    assert report.recovered_logprob_shares(compiled) == pytest.approx([0.0], abs=1e-3)
    assert [row.name for row in baselines] == ["truncation", "sampled chunks", "summary"]
    assert all(row.num_tokens <= nothing.num_tokens + compiled.num_tokens for row in baselines)
    # One score for each seed, of its own prefix.
    assert len(prefix.scores) == len(prefix.logprobs) == len(report.drift["prefix"]) == 2
    assert prefix.logprobs[0] == pytest.approx(compiled.logprobs[0])
    assert prefix.logprobs[1] != pytest.approx(prefix.logprobs[0], abs=1e-3)
    assert report.drift["nothing, compiled"][0].logprob_difference < 1e-4
    assert report.requests_until_paid is report.seconds_spent is None
    text, _, short = report.costs
    assert text.num_bytes * short.num_tokens == short.num_bytes * text.num_tokens


def test_given_references_and_another_metric(generator, tokenizer, context, folders):
    called = []

    def length(answers, references):
        called.append(len(answers))
        assert set(references) == {"Aromi"}
        return 1.0

    report = evaluate(
        generator,
        tokenizer,
        context,
        questions(7, "Aromi"),
        {"prefix": [folders / "nothing"]},
        metric=length,
        metric_name="length",
        **OPTIONS,
    )
    assert report.metric == "length"
    assert report.num_own_references == 0
    assert set(called) == {7}
    # All the same: no verdict.
    assert not report.score.is_clear
    assert report.recovered_shares(report.rows[-1]) is None


def test_references(tokenizer):
    own = [[*tokenizer("The Mill", add_special_tokens=False).input_ids, tokenizer.eos_token_id]] * 2
    found = references_of(tokenizer, [questions(1, " Aromi ")[0], questions(1, " ")[0]], own)
    assert found.texts == ["Aromi", "The Mill"]
    assert found.token_ids == [tokenizer("Aromi", add_special_tokens=False).input_ids, own[1]]
    assert found.num_own == 1


@pytest.mark.parametrize(
    ("names", "number", "message"),
    [
        ([], 1, "There is no prefix to evaluate"),
        (["teacher", "nothing"], 1, "virtual tokens: make a report for each length"),
        (["teacher"], 0, "There are no questions to evaluate with"),
    ],
)
def test_what_cannot_be_compared_is_refused(generator, tokenizer, context, folders, names, number, message):
    with pytest.raises(ValueError, match=message):
        evaluate(generator, tokenizer, context, questions(number), {"prefix": [folders / name for name in names]})
