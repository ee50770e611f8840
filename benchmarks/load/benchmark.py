"""Prepares the model and the adapters, puts load on the server, and reports."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import openai

from benchmarks.load.folder_changes import link
from benchmarks.load.name_history import BASE
from benchmarks.load.process_memory import MemoryMonitor, is_flat
from benchmarks.load.traffic import QUESTIONS, Question, Traffic, ask

# The tiny model and the reference come from the tests.
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from helpers.serving import server, support

LENGTHS = (1, 7, 31, 32, 33, 64, 70)
Answers = dict[tuple[str, Question], str]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Starts the server, puts load on it and returns the report."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.model is None:
            paths, prefixes = write_tiny(folder, options.adapters)
        else:
            (folder / "model").symlink_to(options.model.resolve())
            paths, prefixes = {name: Path(path).resolve() for name, path in options.adapter}, None
        # A small cache forces eviction and preemption. The OS soon allocates all its pages, so that memory can be flat.
        small: tuple[str, ...] = ("--max-model-len", "512", "--num-gpu-blocks-override", str(options.blocks))
        found = None
        if options.folder:
            # The server knows no name, and finds them all.
            found = folder / "found"
            for name, path in paths.items():
                shutil.copytree(path, found / ".versions" / name)
            paths = {name: found / ".versions" / name for name in paths}
            for name, path in paths.items():
                link(found, name, str(path))
            small = (*small, "--prefix-adapter-dir", str(found))
        with server.serve(folder, *small, *options.option, adapters={} if options.folder else paths) as client:
            return put_under_load(str(client.base_url), paths, prefixes, folder, options, found)


def write_tiny(folder: Path, num_adapters: int) -> tuple[dict[str, Path], dict[str, support.Prefix]]:
    """Saves a tiny random model and adapters of various lengths; returns folders and prefixes by name."""
    support.write_model(folder / "model", server.CONFIG, tokenizer=True)
    prefixes = {
        f"a{index}": support.random_prefix(server.CONFIG, LENGTHS[index % len(LENGTHS)], seed=index)
        for index in range(num_adapters)
    }
    return {name: support.write_adapter(folder / name, server.CONFIG, kv) for name, kv in prefixes.items()}, prefixes


def put_under_load(
    base_url: str,
    paths: Mapping[str, Path],
    prefixes: Mapping[str, support.Prefix] | None,
    folder: Path,
    options: argparse.Namespace,
    found: Path | None = None,
) -> dict[str, Any]:
    """Puts load on a running server and returns the report."""
    expected = asyncio.run(expected_answers(base_url, [*paths, BASE]))
    differing = [] if prefixes is None else check_answers(expected, prefixes, folder / "model")
    traffic = Traffic(base_url, expected, {name: str(path) for name, path in paths.items()}, options.seed, found)
    started = time.monotonic()
    with MemoryMonitor() as memory:
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
        "expected answers": len(expected),
        "expected answers that differ from transformers": differing[:10],
        "memory": growth,
    }


async def expected_answers(base_url: str, names: list[str]) -> Answers:
    """Sends every question to every model of an idle server, one at a time."""
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=600) as client:
        return {(name, question): await ask(client, name, question) for name in names for question in QUESTIONS}


def check_answers(answers: Answers, prefixes: Mapping[str, support.Prefix], model: Path) -> list[dict[str, Any]]:
    """Returns the answers that differ from those of transformers with the tiny model, whose tokens are whole words."""
    reference = support.Reference(model)
    differing = []
    for (name, question), answer in answers.items():
        prompt = [support.WORDS.index(word) for word in question.prompt.split()]
        words = support.text_of(reference.greedy(prompt, prefixes.get(name), question.max_tokens))
        if answer.split() != words.split():
            differing.append({"model": name, **asdict(question), "answer": answer, "expected": words})
    return differing
