"""Trains two prefixes for a small model, serves both beside it, and compares the server with PEFT.

    python examples/demo.py                                       # SmolLM2-135M-Instruct and E2E, from packages
    python examples/demo.py --model Qwen/Qwen3-0.6B --steps 300   # any chat model on the hub
    python examples/demo.py --data my_facts.json                  # other data, in the format that e2e.py describes

The base model gets the same prompts as the prefixes, including the instruction. Scores are computed on the server's
greedy answers about restaurants that training did not see. Prints the commands that start the server and query it again,
then the results as one line of JSON. Fails if a token of the server differs from `PeftModel.generate`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from e2e import DESCRIBE, EXTRACT, TASKS, Example, examples, get_e2e, load, split
from metrics import bleu, slot_f1
from next_commands import commands
from parity import count_equal, generate
from report import save_losses, table
from serve import BASE, Answer, Question, Server
from smollm2 import get_smollm2
from train import Training, TrainingSettings, train

SHOWN = 3  # rows in the table of each task
PARITY_PROMPTS = 8  # for the base model and for each prefix


def main() -> int:
    args = parse_args()
    output: Path = args.output.absolute()  # adapters record the model by this path
    output.mkdir(parents=True, exist_ok=True)

    section("Model and data")
    model = args.model or str(get_smollm2(output))
    restaurants = load(args.data or get_e2e(output))
    training_set, held_back = split(restaurants, args.held_back, args.seed)
    print(f"{model}\n{len(training_set)} restaurants to train on, {len(held_back)} held back")

    trainings = {}
    for task in TASKS:
        section(f"Train {task.name}")
        settings = TrainingSettings(model=model, task=task, steps=args.steps, seed=args.seed)
        trainings[task.name] = train(settings, examples(task, training_set), output / "adapters" / task.name)
        print(summary(trainings[task.name]))
    save_losses({name: training.losses for name, training in trainings.items()}, output / "loss.png")
    print(f"The loss curves are in {output / 'loss.png'}")

    section("Serve")
    adapters = {name: training.folder for name, training in trainings.items()}
    tests = {task.name: examples(task, held_back, first_only=True) for task in TASKS}
    questions = [
        Question(name, example.messages) for task in TASKS for name in (BASE, task.name) for example in tests[task.name]
    ]
    checked = parity_indices(questions)
    with Server(model, adapters, output / "server.log") as server:
        print(f"Ready after {server.ready_seconds:.1f} s: {BASE}, {', '.join(adapters)}")
        answers = server.ask(questions, "all models at once")
        warm = server.ask([questions[i] for i in checked], "a few again, prefix cached")
    count = len(held_back)
    parts = [answers[i : i + count] for i in range(0, len(answers), count)]
    base = {task.name: part for task, part in zip(TASKS, parts[0::2], strict=True)}
    tuned = {task.name: part for task, part in zip(TASKS, parts[1::2], strict=True)}
    for task in TASKS:
        print(f"\n{comparison(task.name, tests[task.name], base[task.name], tuned[task.name])}")

    section("Compare with PeftModel.generate")
    expected = generate(model, adapters, [questions[i] for i in checked])
    equal = count_equal(expected, [answers[i] for i in checked], warm)
    print(f"{equal} of {len(checked)} answers have the same tokens, with and without a cached prefix")

    section("Next")
    start, *asks = commands(model, adapters, {name: questions_of[0] for name, questions_of in tests.items()})
    print(f"Start the server, from any folder:\n\n{start}\n\nOnce it is ready, in another shell:\n")
    print("\n\n".join(asks), end="\n\n")

    results = {
        "describe_bleu_base": round(describe_score(tests[DESCRIBE.name], base[DESCRIBE.name]), 2),
        "describe_bleu": round(describe_score(tests[DESCRIBE.name], tuned[DESCRIBE.name]), 2),
        "extract_f1_base": round(extract_score(tests[EXTRACT.name], base[EXTRACT.name]), 4),
        "extract_f1": round(extract_score(tests[EXTRACT.name], tuned[EXTRACT.name]), 4),
        "parity_prompts": len(checked),
        "parity_equal": equal,
        "train_seconds": round(sum(training.seconds for training in trainings.values()), 1),
        "serve_ready_seconds": round(server.ready_seconds, 1),
    }
    (output / "results.json").write_text(json.dumps(results) + "\n")
    print(json.dumps(results))
    return 0 if equal == len(checked) else 1


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder of a chat model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--data", type=Path, help="JSON file of other data, or its folder (default: E2E)")
    parser.add_argument("--output", type=Path, default=Path(".demo"), help="output folder (default: .demo)")
    parser.add_argument("--steps", type=int, default=120, help="training steps of each task (default: 120)")
    parser.add_argument(
        "--held-back", type=int, default=64, help="restaurants to hold back for the scores (default: 64)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and of training (default: 0)")
    return parser.parse_args()


def parity_indices(questions: list[Question]) -> list[int]:
    """Returns the indices of the first questions to each model, whose answers are compared with PEFT's."""
    chosen: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        chosen.setdefault(question.model, []).append(index)
    return [index for indices in chosen.values() for index in indices[:PARITY_PROMPTS]]


def describe_score(tests: list[Example], answers: list[Answer]) -> float:
    return bleu([answer.text for answer in answers], [test.restaurant.sentences for test in tests])


def extract_score(tests: list[Example], answers: list[Answer]) -> float:
    return slot_f1([answer.text for answer in answers], [test.restaurant.facts for test in tests])


def comparison(task: str, tests: list[Example], base: list[Answer], tuned: list[Answer]) -> str:
    rows = [
        (test.messages[-1]["content"], before.text, after.text)
        for test, before, after in zip(tests[:SHOWN], base, tuned, strict=False)
    ]
    return table([f"{task}: input", "base", "prefix"], rows)


def summary(training: Training) -> str:
    how = "Reused the adapter" if training.reused else "Trained"
    loss = f"loss {training.losses[0]:.2f} -> {training.losses[-1]:.2f}"
    return f"{how} in {training.folder}: {training.seconds:.0f} s, {loss}"


def section(title: str) -> None:
    print(f"\n== {title} ==", flush=True)


if __name__ == "__main__":
    sys.exit(main())
