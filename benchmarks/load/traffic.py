"""Random requests of many clients to a server whose adapters change meanwhile, each compared with what it must say.

What an answer may be follows from what its model's name meant while the request was under way: one content, two if an
operator replaced one with another meanwhile, or none, in which case the answer is 404.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import openai

BASE = "base"
# Some begin like others, so that they share blocks of real tokens; the shortest and the longest fill 1 and 80 tokens of
# the tiny model's vocabulary of whole words.
PROMPTS = tuple(
    " ".join(f"w{3 + (7 * index + offset * (index >= common)) % 60}" for index in range(length))
    for length, common, offset in ((1, 0, 0), (12, 0, 1), (40, 0, 0), (40, 32, 1), (80, 32, 2), (80, 64, 3))
)


@dataclass(frozen=True)
class Question:
    """What a client may ask any model."""

    prompt: str
    max_tokens: int
    chat: bool


QUESTIONS = [
    Question(prompt, max_tokens, chat)
    for prompt, max_tokens in zip(PROMPTS, (24, 16, 8, 4, 24, 12), strict=True)
    for chat in (False, True)
]


async def ask(client: openai.AsyncOpenAI, model: str, question: Question, chunks: float | None = None) -> str:
    """Returns what a model says, greedily.

    Args:
        chunks: Streams the answer, and hangs up after so many pieces; None asks for the whole answer at once.
    """
    options: dict[str, Any] = {
        **{"model": model, "max_tokens": question.max_tokens, "temperature": 0, "stream": chunks is not None},
        "extra_body": {"ignore_eos": True, "skip_special_tokens": False},
    }
    if question.chat:
        messages: Any = [{"role": "user", "content": question.prompt}]
        response = await client.chat.completions.create(messages=messages, **options)
    else:
        response = await client.completions.create(prompt=question.prompt, **options)
    if chunks is None:
        (choice,) = response.choices
        return (choice.message.content if question.chat else choice.text) or ""
    text, count = "", 0
    async with contextlib.aclosing(response.__aiter__()) as stream:
        async for chunk in stream:
            for choice in chunk.choices:
                text += (choice.delta.content if question.chat else choice.text) or ""
            count += 1
            if count >= chunks:
                await response.close()
                break
    return text


@dataclass
class Meaning:
    """What a name stood for, from when to when: a content, or None for nothing."""

    content: str | None
    begin: float = -math.inf
    end: float = math.inf


class Names:
    """What each model name meant at which time.

    Args:
        contents: The content of each adapter; its name to begin with.
    """

    def __init__(self, contents: Sequence[str]) -> None:
        self.meanings: dict[str, list[Meaning]] = {name: [Meaning(name)] for name in (*contents, BASE)}

    def now(self, name: str) -> str | None:
        return self.meanings[name][-1].content

    def during(self, name: str, begin: float, end: float) -> set[str | None]:
        """Returns all that a name meant at any moment between two."""
        return {meaning.content for meaning in self.meanings[name] if meaning.begin <= end and begin <= meaning.end}


@dataclass
class Outcome:
    """What became of all requests."""

    answers: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        """Whether every answer is one that there may be, and no status is but 200, and 404 for what was not there."""
        return not self.wrong and self.statuses.keys() <= {"200", "404"}


class Traffic:
    """Clients and an operator of one server.

    Args:
        expected: What each content, or the base model, says to each question.
        paths: The folder of each content.
        seed: Of all that is drawn; what happens when also depends on the server.
    """

    def __init__(
        self, base_url: str, expected: dict[tuple[str, Question], str], paths: dict[str, str], seed: int = 0
    ) -> None:
        self.outcome = Outcome()
        self._client = openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=600)
        self._expected, self._paths = expected, paths
        self._names = Names(list(paths))
        self._seed = seed

    async def run(self, num_clients: int, seconds: float, max_requests: float = math.inf) -> Outcome:
        """Keeps all clients busy for so long, or for so many requests; then every adapter is what it was before.

        Of a number of requests, a change comes after some of them, however long they take.
        """
        self._left, self._until = max_requests, self._clock() + seconds
        # A third of the adapters change: half of them become another one in place, half of them go and come.
        changing = list(self._paths)[-max(2, len(self._paths) // 3) :]
        async with asyncio.TaskGroup() as tasks:
            operator = tasks.create_task(self._operate(changing))
            clients = [
                asyncio.create_task(self._ask_on(random.Random(f"{self._seed} {index}")))
                for index in range(num_clients)
            ]
            await asyncio.gather(*clients)
            self._until = -math.inf
            await operator
        for name in changing:
            await self._change(name, name)
        await self._client.close()
        return self.outcome

    async def _ask_on(self, rng: random.Random) -> None:
        names = [*self._paths, BASE]
        while self._clock() < self._until and self._left > 0:
            self._left -= 1
            await self._ask_once(rng, rng.choice(names), rng.choice(QUESTIONS))

    async def _ask_once(self, rng: random.Random, name: str, question: Question) -> None:
        streams, aborts = rng.random() < 0.5, rng.random() < 0.15
        chunks = (rng.randrange(1, question.max_tokens) if aborts else math.inf) if streams else None
        begin, text, status = self._clock(), None, "200"
        asked = ask(self._client, name, question, chunks)
        try:
            # Without a stream, a client hangs up at any time: soon after it has asked, mostly.
            text = await (asyncio.wait_for(asked, rng.random() ** 3) if aborts and not streams else asked)
        except TimeoutError:
            self.outcome.answers["hung up"] += 1
            return
        except openai.APIStatusError as error:
            status = str(error.status_code)
        except openai.APIError as error:
            # No answer, or an error in the middle of a stream.
            status = type(error).__name__
        self.outcome.statuses[status] += 1
        meanings = self._names.during(name, begin, self._clock())
        expected = [None if content is None else self._expected[content, question] for content in meanings]
        if text is None:
            right = status == "404" and None in expected
        elif streams and aborts:
            right = any(answer is not None and answer.startswith(text) for answer in expected)
        else:
            right = text in expected
        how = "begun" if streams and aborts else "streamed" if streams else "whole"
        self.outcome.answers[how if right else "wrong"] += 1
        if not right:
            self.outcome.wrong.append(
                {"model": name, **asdict(question), "status": status, "answer": text, "expected": expected}
            )

    async def _operate(self, changing: list[str]) -> None:
        """Replaces, unloads and loads adapters, one after another."""
        rng = random.Random(f"{self._seed} operator")
        while self._clock() < self._until:
            name = rng.choice(changing)
            if changing.index(name) % 2:
                other = rng.choice([content for content in self._paths if content != self._names.now(name)])
                await self._change(name, other)
            else:
                await self._change(name, name if self._names.now(name) is None else None)
            pause, before = rng.random(), self._left
            await asyncio.sleep(0.2 * pause if before == math.inf else 0)
            while before < math.inf and before - self._left < 12 * pause and self._clock() < self._until:
                await asyncio.sleep(0.01)

    async def _change(self, name: str, content: str | None) -> None:
        """Gives a name another meaning; while that is under way, it has both."""
        before = self._names.meanings[name][-1]
        if content == before.content:
            return
        self._names.meanings[name].append(Meaning(content, self._clock()))
        change = "unload" if content is None else "load" if before.content is None else "replace"
        body: dict[str, Any] = {"prefix_name": name}
        if content is not None:
            body |= {"prefix_path": self._paths[content], "load_inplace": before.content is not None}
        await self._client.post(f"/{'unload' if content is None else 'load'}_prefix_adapter", body=body, cast_to=str)
        before.end = self._clock()
        self.outcome.changes[change] += 1

    @staticmethod
    def _clock() -> float:
        return asyncio.get_running_loop().time()
