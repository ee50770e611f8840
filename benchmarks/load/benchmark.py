"""Does it hold? Many clients at once on a real server whose adapters are replaced, unloaded and loaded meanwhile.

    python benchmarks/load.py                                  # a tiny random model, 20 adapters, 64 clients, 5 minutes
    python benchmarks/load.py --seconds 60 --clients 8
    python benchmarks/load.py --model MODEL_FOLDER --adapter a=FOLDER_A --adapter b=FOLDER_B --adapter c=FOLDER_C

What each adapter and the base must say is asked of the quiet server first, one request at a time; for the tiny model
transformers must say the same. Prints a JSON report; exits with 1 if an answer is wrong, a status is neither 200 nor the
404 of an adapter that is not there, or a process grows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import openai

from benchmarks.load.process_memory import Memory, is_flat
from benchmarks.load.traffic import BASE, QUESTIONS, Question, Traffic, ask

# In front of this folder, which has a `serving`, too.
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from serving import server, support  # type: ignore[attr-defined]

LENGTHS = (1, 7, 31, 32, 33, 64, 70)
Answers = dict[tuple[str, Question], str]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.model is None:
            paths, prefixes = write_tiny(folder, options.adapters)
        else:
            (folder / "model").symlink_to(options.model.resolve())
            paths, prefixes = {name: Path(path).resolve() for name, path in options.adapter}, None
        # A cache of few blocks evicts and preempts; and its pages are all touched soon, after which memory is flat.
        small = ("--max-model-len", "512", "--num-gpu-blocks-override", str(options.blocks))
        with server.serve(folder, *small, adapters=paths) as client:
            report = load(str(client.base_url), paths, prefixes, folder, options)
    print(json.dumps(report, indent=2))
    return 0 if report["ok"] else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model; a tiny random one by default")
    parser.add_argument(
        "--adapter",
        metavar="NAME=FOLDER",
        type=lambda text: tuple(text.split("=", 1)),
        action="append",
        default=[],
        help="an adapter of --model; at least three",
    )
    parser.add_argument("--adapters", type=int, default=20, help="how many the tiny model has")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--blocks", type=int, default=256, help="of 32 tokens, in the server's cache")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.model is not None and len(options.adapter) < 3:
        parser.error(f"--model needs at least three --adapter, got {len(options.adapter)}")
    return options


def write_tiny(folder: Path, num_adapters: int) -> tuple[dict[str, Path], dict[str, support.Prefix]]:
    """Saves a tiny random model and adapters of many lengths."""
    support.write_model(folder / "model", server.CONFIG, tokenizer=True)
    prefixes = {
        f"a{index}": support.random_prefix(server.CONFIG, LENGTHS[index % len(LENGTHS)], seed=index)
        for index in range(num_adapters)
    }
    return {name: support.write_adapter(folder / name, server.CONFIG, kv) for name, kv in prefixes.items()}, prefixes


def load(
    base_url: str,
    paths: Mapping[str, Path],
    prefixes: Mapping[str, support.Prefix] | None,
    folder: Path,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Returns the report of a load on a running server."""
    expected = asyncio.run(quiet_answers(base_url, [*paths, BASE]))
    differing = [] if prefixes is None else check_answers(expected, prefixes, folder / "model")
    traffic = Traffic(base_url, expected, {name: str(path) for name, path in paths.items()}, options.seed)
    started = time.monotonic()
    with Memory() as memory:
        outcome = asyncio.run(traffic.run(options.clients, options.seconds))
    growth = memory.report()
    return {
        "ok": outcome.is_right and not differing and is_flat(growth),
        "settings": {key: str(value) for key, value in vars(options).items()},
        "seconds": round(time.monotonic() - started, 1),
        "requests": sum(outcome.answers.values()),
        "answers": dict(outcome.answers),
        "statuses": dict(outcome.statuses),
        "changes of adapters": dict(outcome.changes),
        "wrong": outcome.wrong[:10],
        "quiet answers": len(expected),
        "quiet answers that transformers does not give": differing[:10],
        "memory": growth,
    }


async def quiet_answers(base_url: str, names: list[str]) -> Answers:
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=600) as client:
        return {(name, question): await ask(client, name, question) for name in names for question in QUESTIONS}


def check_answers(answers: Answers, prefixes: Mapping[str, support.Prefix], model: Path) -> list[dict[str, Any]]:
    """Returns the answers that are not what transformers says with the tiny model, whose tokens are whole words."""
    reference = support.Reference(model)
    differing = []
    for (name, question), answer in answers.items():
        prompt = [support.WORDS.index(word) for word in question.prompt.split()]
        words = support.text_of(reference.greedy(prompt, prefixes.get(name), question.max_tokens))
        if answer.split() != words.split():
            differing.append({"model": name, **asdict(question), "answer": answer, "expected": words})
    return differing


if __name__ == "__main__":
    sys.exit(main())
