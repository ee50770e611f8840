"""The distillation benchmark: its data, and each task that needs no engine on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.common.results import ResultsFile
from benchmarks.common.workload import Workload
from benchmarks.distillation.__main__ import main
from benchmarks.distillation.bench import Bench
from benchmarks.distillation.documents import PAGE, SHEET, document
from benchmarks.distillation.fact_sheets import FACTS, NUM_CHOICES, fact_sheet, names, parts
from benchmarks.distillation.manual_page import manual_page
from benchmarks.distillation.many_shot import many_shot
from benchmarks.distillation.next_token import CHUNK_TOKENS, chunk_targets
from benchmarks.distillation.paraphrases import paraphrases
from benchmarks.distillation.settings import Settings
from benchmarks.distillation.tasks import documents, speed, step, together
from benchmarks.distillation.tasks import many_shot as many_shot_task
from helpers.distillation import chat_model, chatml_tokenizer

TINY = {
    **{
        "num_held_out": 2,
        "num_shots": 3,
        "num_inputs": 8,
        "num_tests": 6,
        "many_shot_tokens": 48,
        "many_shot_steps": 2,
    },
    **{
        "many_shot_answer": 4,
        "topic": "async",
        "num_questions": 10,
        "num_people": 3,
        "num_exam": 6,
        "document_steps": 2,
    },
    **{"document_answer": 4, "num_sheets": 2, "people_per_sheet": 1, "together_tokens": 8},
    **{"prefix_tokens": 8, "step_length": 8, "step_rounds": 2},
}


def content_of(question) -> str:
    return question.messages[-1]["content"]


# The data.


def test_choices_have_the_right_answer_first() -> None:
    sheet = fact_sheet(24, seed=3)
    assert len(names(sheet)) == len(set(names(sheet))) == 24
    assert len(sheet.questions) == len({content_of(question) for question in sheet.questions}) == 24 * len(FACTS)
    for question, choices in zip(sheet.questions, sheet.choices, strict=True):
        assert question.reference == choices[0]
        assert choices[0] in sheet.text
        assert len(set(choices)) == NUM_CHOICES
        assert not any(wrong in sheet.text for wrong in choices[1:])


def test_training_never_sees_a_question_of_the_exam() -> None:
    sheet = fact_sheet(6, seed=0)
    asked = [content_of(question) for question in paraphrases(sheet)]
    assert len(set(asked)) == len(asked) == 2 * len(sheet.questions)
    assert not {content_of(question) for question in sheet.questions} & set(asked)
    assert all(question.reference is None for question in paraphrases(sheet))
    assert all(any(name in content for content in asked) for name in names(sheet))


def test_parts_of_a_sheet_are_about_different_people() -> None:
    sheet = fact_sheet(9, seed=0)
    found = parts(sheet, 4)
    assert [len(names(part)) for part in found] == [2] * 4
    assert len({name for part in found for name in names(part)}) == 8
    for part in found:
        assert len(part.questions) == len(part.choices) == 2 * len(FACTS)
        assert all(choices[0] in part.text for choices in part.choices)


def test_pages_of_the_manual() -> None:
    assert manual_page().startswith("Naming and binding")
    with pytest.raises(ValueError, match="no page 'none of them'"):
        manual_page("none of them")


def test_tests_are_neither_shots_nor_inputs(e2e_json: Path) -> None:
    task = many_shot(e2e_json, num_shots=4, num_inputs=10, num_tests=6, seed=1)
    shots = {message["content"] for message in task.opening if message["role"] == "user"}
    inputs, tests = ({content_of(question) for question in each} for each in (task.inputs, task.tests))
    assert (len(shots), len(inputs), len(tests)) == (4, 10, 6)
    assert len(shots | inputs | tests) == 20
    assert all(question.reference is None for question in task.inputs)
    references = [question.reference for question in task.tests]
    assert all(len(task.sentences[reference]) == 2 for reference in references)
    # Any of the sentences counts.
    assert task.bleu([task.sentences[reference][1] for reference in references], references) == pytest.approx(100)
    assert many_shot(e2e_json, 4, 10, 6, seed=2).opening != task.opening


def test_next_tokens_are_targets_of_probability_one() -> None:
    ids = list(range(1000, 1000 + 3 * CHUNK_TOKENS))
    targets = chunk_targets(ids, 5, seed=0)
    assert len({target.prompt_ids[0] for target in targets}) == 5
    for target in targets:
        chunk = [*target.prompt_ids, *target.answer_ids]
        assert chunk == list(range(chunk[0], chunk[0] + CHUNK_TOKENS))
        assert target.top_ids == [[token] for token in target.answer_ids]
        assert target.top_logprobs == [[0.0]] * len(target.answer_ids)


def test_only_uncached_requests_have_texts_of_their_own() -> None:
    settings = Settings("tiny", context_tokens=20, prefix_tokens=4)
    workload = Workload(num_requests=3, input_tokens=5, output_tokens=2, vocab_size=100)
    found = speed.candidates(settings)
    for name, number in ((speed.UNCACHED, 3), (speed.CACHED, 1)):
        prompts = [request.prompt for request in found[name].requests(workload, "round")]
        assert [len(prompt) for prompt in prompts] == [25] * 3
        assert len({tuple(prompt[:20]) for prompt in prompts}) == number
    first, second = (found[speed.CACHED].requests(workload, seed)[0].prompt for seed in ("round", "next"))
    assert first[:20] == second[:20]
    assert first[20:] != second[20:]
    for name, adapter in ((speed.COMPILED, "prefix20-0"), (speed.DISTILLED, "prefix4-0")):
        requests = found[name].requests(workload, "round")
        assert {(len(request.prompt), request.adapter) for request in requests} == {(5, adapter)}


# The tasks.


@pytest.fixture(scope="module")
def e2e_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples as `make demo` leaves them: 24 inputs with two sentences each."""
    path = tmp_path_factory.mktemp("e2e") / "e2e.json"
    examples = [
        {"input": f"name: P{number}", "target": target.format(number)}
        for number in range(24)
        for target in ("The place P{} serves food.", "Food is served at P{} by day.")
    ]
    path.write_text(json.dumps({"examples": examples}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    tokenizer = chatml_tokenizer()
    folder = tmp_path_factory.mktemp("base")
    tokenizer.save_pretrained(folder)
    chat_model(tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bench(base: str, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    settings = Settings(base, **TINY)
    folder = tmp_path_factory.mktemp("results")
    return Bench(settings, ResultsFile(folder / "distillation.json", settings.record()), folder / "work")


def test_the_exam_on_a_page_is_not_trained_on(bench: Bench) -> None:
    found = document(bench, PAGE, seed=0)
    exam, training = ({content_of(question) for question in each} for each in (found.exam.questions, found.questions))
    assert exam
    assert training
    assert not exam & training
    again = document(bench, PAGE, seed=0)
    assert [content_of(question) for question in again.exam.questions] == list(map(content_of, found.exam.questions))


def test_documents(bench: Bench) -> None:
    documents.run(bench, [SHEET], (8,), [0])
    nothing_and_full, record = bench.results.find(task="documents")
    assert nothing_and_full["length"] is None
    assert nothing_and_full["intervals"].keys() == {"choice", "logprob", "score"}
    assert set(nothing_and_full["rows"]) == {"nothing", "full context"}
    assert record["length"] == 8
    assert {"distilled", "next-token training"} <= set(record["rows"])
    for row in (record["rows"]["distilled"], record["rows"]["next-token training"]):
        assert row["tokens"] == 8
        assert 0 <= row["choice"] <= 1
        assert row["logprob"] < 0
    assert record["rows"]["distilled"] != record["rows"]["next-token training"]
    assert record["divergence"] > 0
    # Nothing is measured twice.
    documents.run(bench, [SHEET], (8,), [0])
    assert len(bench.results.find(task="documents")) == 2


def test_many_shot(bench: Bench, e2e_json: Path) -> None:
    many_shot_task.run(bench, e2e_json, [0])
    (record,) = bench.results.find(task="many-shot")
    assert set(record["rows"]) == {"nothing", "one shot", "4 shots", "full context", "distilled"}
    assert record["rows"]["distilled"]["tokens"] == 48
    assert record["rows"]["full context"]["tokens"] > record["rows"]["one shot"]["tokens"] > 0


def test_together(bench: Bench) -> None:
    together.run(bench, [0])
    records = {record["number"]: record["rows"] for record in bench.results.find(task="together")}
    assert set(records) == {0, 1, 2}
    assert set(records[0]) == {"nothing", "full context"}
    for number in (1, 2):
        assert set(records[number]) == {together.APART, together.BESIDE}
        assert records[number][together.APART]["tokens"] == 8 * number
    # Each prefix does other things among others than alone.
    assert records[1][together.APART]["logprob"] != records[2][together.APART]["logprob"]


def test_step(bench: Bench) -> None:
    step.run(bench)
    (record,) = bench.results.find(task="step")
    assert all(len(rounds) == 2 for rounds in record["measurements"].values())
    assert all(one["seconds"] > 0 for rounds in record["measurements"].values() for one in rounds)


def test_command_without_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--tasks", "many-shot", "--e2e", str(tmp_path / "none.json")])
    assert "none.json is not there: run `make demo`" in capsys.readouterr().err
