"""Random requests of many clients to a server whose adapters change, with a check of every answer.

A model's name refers to one adapter at a time. The right answer to a request is that of the adapter that its model's name
referred to while the request was running; either of two if the adapter was replaced meanwhile; 404 if there was none; and,
while its files were overwritten, also HTTP 400 that says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import openai

from benchmarks.load import folder_changes
from benchmarks.load.name_history import BASE, Assignment, NameHistory

# When a server has noticed a change in its folder of adapters, and the requests that began before have their adapters.
NOTICED_SECONDS = 2.0
# Some prompts share their beginning, and so blocks of real tokens. They have 1 to 80 tokens of the tiny model, whose
# vocabulary is whole words.
PROMPTS = tuple(
    " ".join(f"w{3 + (7 * index + offset * (index >= common)) % 60}" for index in range(length))
    for length, common, offset in ((1, 0, 0), (12, 0, 1), (40, 0, 0), (40, 32, 1), (80, 32, 2), (80, 64, 3))
)


@dataclass(frozen=True)
class Question:
    """A request that a client may send to any model."""

    prompt: str
    max_tokens: int
    chat: bool


QUESTIONS = [
    Question(prompt, max_tokens, chat)
    for prompt, max_tokens in zip(PROMPTS, (24, 16, 8, 4, 24, 12), strict=True)
    for chat in (False, True)
]


async def ask(client: openai.AsyncOpenAI, model: str, question: Question, chunks: float | None = None) -> str:
    """Returns the greedy answer of a model.

    Args:
        client: The client.
        model: The model's name.
        question: The request.
        chunks: Streams the answer and disconnects after that many chunks; None does not stream.
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
class Outcome:
    """Counts of answers, statuses and changes, and the wrong answers."""

    answers: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        """Whether every answer is right and every status is 200, or that of a right refusal."""
        return not self.wrong and self.statuses.keys() <= {"200", "400", "404"}


class Traffic:
    """Clients and an operator of one server.

    Args:
        base_url: The address of the server.
        expected: The answer of each adapter and of the base model to each question.
        paths: The folders of the adapters by name.
        seed: The seed of requests and changes. Their order in time also depends on the server.
        folder: The server's `--prefix-adapter-dir`, with a link to the folder of each adapter: the links and the files change,
            and nothing is loaded or unloaded.
    """

    def __init__(
        self,
        base_url: str,
        expected: dict[tuple[str, Question], str],
        paths: dict[str, str],
        seed: int = 0,
        folder: Path | None = None,
    ) -> None:
        self.outcome = Outcome()
        self._client = openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=600)
        self._expected, self._paths = expected, paths
        self._names = NameHistory(list(paths))
        self._seed, self._folder = seed, folder
        # A third of the adapters change: half of them are replaced, half are unloaded and loaded. In a folder, every third one
        # is overwritten in place.
        self._changing = list(paths)[-max(2 if folder is None else 3, len(paths) // 3) :]
        self._overwritten = [] if folder is None else self._changing[2::3]

    async def run(self, num_clients: int, seconds: float, max_requests: float = math.inf) -> Outcome:
        """Keeps all clients busy for some seconds or a number of requests, then restores all adapters.

        With `max_requests`, changes are spaced by the number of requests instead of time.
        """
        self._left, self._until = max_requests, self._clock() + seconds
        for name in self._overwritten:
            assert self._folder is not None
            folder_changes.copy(self._folder, name)
        async with asyncio.TaskGroup() as tasks:
            operator = tasks.create_task(self._operate())
            clients = [
                asyncio.create_task(self._run_client(random.Random(f"{self._seed} {index}")))
                for index in range(num_clients)
            ]
            await asyncio.gather(*clients)
            self._until = -math.inf
            await operator
        for name in self._changing:
            await self._change(name, name)
        await self._client.close()
        return self.outcome

    async def _run_client(self, rng: random.Random) -> None:
        names = [*self._paths, BASE]
        while self._clock() < self._until and self._left > 0:
            self._left -= 1
            await self._ask_once(rng, rng.choice(names), rng.choice(QUESTIONS))

    async def _ask_once(self, rng: random.Random, name: str, question: Question) -> None:
        streams, aborts = rng.random() < 0.5, rng.random() < 0.15
        chunks = (rng.randrange(1, question.max_tokens) if aborts else math.inf) if streams else None
        begin, text, status = self._clock(), None, "200"
        answer = ask(self._client, name, question, chunks)
        try:
            # Without streaming, clients disconnect at any time, most of them early.
            text = await (asyncio.wait_for(answer, rng.random() ** 3) if aborts and not streams else answer)
        except TimeoutError:
            self.outcome.answers["hung up"] += 1
            return
        except openai.APIStatusError as error:
            status = str(error.status_code)
        except openai.APIError as error:
            # No answer, or an error in the middle of a stream, which has a status of its own.
            status = str(error.code or type(error).__name__)
        found = self._names.during(name, begin, self._clock())
        expected = [None if one.adapter is None else self._expected[one.adapter, question] for one in found]
        refusals = [one.refusal for one in found if one.adapter is None]
        if text is None:
            right = status in refusals
        elif streams and aborts:
            right = any(right_text is not None and right_text.startswith(text) for right_text in expected)
        else:
            right = text in expected
        self.outcome.statuses[status] += 1
        how = "begun" if streams and aborts else "streamed" if streams else "whole"
        self.outcome.answers[how if right else "wrong"] += 1
        if not right:
            self.outcome.wrong.append(
                {"model": name, **asdict(question), "status": status, "answer": text, "expected": expected}
            )

    async def _operate(self) -> None:
        """Replaces, unloads and loads adapters, one at a time."""
        rng = random.Random(f"{self._seed} operator")
        while self._clock() < self._until:
            name = rng.choice(self._changing)
            if name in self._overwritten or self._changing.index(name) % 2:
                other = rng.choice([adapter for adapter in self._paths if adapter != self._names.now(name)])
                await self._change(name, other)
            else:
                await self._change(name, name if self._names.now(name) is None else None)
            pause, before = rng.random(), self._left
            await asyncio.sleep(0.2 * pause if before == math.inf else 0)
            while before < math.inf and before - self._left < 12 * pause and self._clock() < self._until:
                await asyncio.sleep(0.01)

    async def _change(self, name: str, adapter: str | None) -> None:
        """Makes a name refer to another adapter or to none; during the change, both answers are right."""
        before = self._names.assignments[name][-1]
        if adapter == before.adapter:
            return
        if name in self._overwritten:
            await self._overwrite(name, adapter or name)
            return
        self._names.assignments[name].append(Assignment(adapter, self._clock()))
        change = "unload" if adapter is None else "load" if before.adapter is None else "replace"
        if self._folder is not None:
            folder_changes.link(self._folder, name, None if adapter is None else self._paths[adapter])
            before.end = self._clock() + NOTICED_SECONDS
        else:
            body: dict[str, Any] = {"prefix_name": name}
            if adapter is not None:
                body |= {"prefix_path": self._paths[adapter], "load_inplace": before.adapter is not None}
            await self._client.post(
                f"/{'unload' if adapter is None else 'load'}_prefix_adapter", body=body, cast_to=str
            )
            before.end = self._clock()
        self.outcome.changes[change] += 1

    async def _overwrite(self, name: str, adapter: str) -> None:
        """Does nothing if the change before was just made: a request that has met two of them is refused with HTTP 503."""
        assert self._folder is not None
        history, now = self._names.assignments[name], self._clock()
        if now < history[-1].begin + 2 * NOTICED_SECONDS and self._until > now:
            return
        before, refused = history[-1], Assignment(None, now, refusal="400")
        history += [refused, Assignment(adapter, now)]
        # In a thread, which does not wait for the clients: a file that is still for long looks whole.
        await asyncio.to_thread(folder_changes.overwrite, self._folder / name, self._paths[adapter])
        before.end = refused.end = self._clock() + NOTICED_SECONDS
        self.outcome.changes["overwrite"] += 1

    @staticmethod
    def _clock() -> float:
        return asyncio.get_running_loop().time()
