"""What else could stand in a context's place at a prefix's length: a part of it, a summary, fewer examples, or nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from peft_prefix_ext.distillation.context import Context, Messages
from peft_prefix_ext.generation.generator import Generator, text_of
from peft_prefix_ext.generation.prompts import prompt_ids

NOTHING = "nothing"
SUMMARIZE = (
    "Summarize all of the above in at most {words} words, so that questions about it can be answered from your summary alone. "
    "Keep names, numbers and rules. Write the summary and nothing else."
)
_QUESTION: Messages = [{"role": "user", "content": "Why?"}]
# Of the sampled chunks: as many as give a fair picture of the text, each long enough to say something.
_MAX_CHUNKS, _MIN_TOKENS_PER_CHUNK = 8, 16
# English, and most tokenizers of today.
_WORDS_PER_TOKEN = 0.75


@dataclass(frozen=True)
class Opening:
    """The opening messages of a chat, with the name that they have in a report."""

    name: str
    messages: Messages


def baseline_openings(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    context: Context,
    num_tokens: int,
    *,
    teacher: str = "teacher",
    seed: int = 0,
) -> list[Opening]:
    """Returns what to compare a prefix with, in the place of a context.

    "nothing" comes first: no opening, or the messages before the first worked example. All others are at most `num_tokens`
    tokens longer than it; those of which nothing fits are left out. In the place of worked examples (user and assistant in
    turn) there are "fewer shots", the first of them that fit, and "one shot" if that is less. In the place of a text there
    are its "truncation", "sampled chunks" in their order, and a "summary" by the base model.

    Args:
        generator: The base model, with the prefix of the whole context.
        tokenizer: Its tokenizer.
        context: The opening of a chat.
        num_tokens: The length of the prefix to compare with.
        teacher: The name of the prefix of the whole context in `generator`.
        seed: What the chunks are drawn with.

    Raises:
        ValueError: If the context is not the opening of a chat.
    """
    if not context.messages:
        raise ValueError("The context must be the opening of a chat: make it by `chat_context`.")
    head, shots = worked_examples(context.messages)
    if shots:
        nothing = head
    else:
        # The text is the longest message; what stands beside it, such as an instruction, stays.
        place = max(range(len(head)), key=lambda index: len(_text(head[index])))
        text, nothing = _text(head[place]), [*head[:place], *head[place + 1 :]]
    least = opening_length(tokenizer, context, nothing)

    def fits(messages: Messages) -> bool:
        return opening_length(tokenizer, context, messages) - least <= num_tokens

    def with_text(part: str) -> Messages:
        return [*head[:place], {**head[place], "content": part}, *head[place + 1 :]]

    if shots:
        found = _fewer_shots(head, shots, fits)
    elif not fits(with_text("")):
        found = iter(())
    else:
        room = num_tokens - (opening_length(tokenizer, context, with_text("")) - least)
        request: Messages = [{"role": "user", "content": SUMMARIZE.format(words=max(1, int(room * _WORDS_PER_TOKEN)))}]
        prompt = prompt_ids(tokenizer, request, context.chat_template)
        (answer,) = generator.generate([prompt], max_new_tokens=max(1, room), prefix=teacher)
        found = _parts(text, text_of(tokenizer, answer), room, with_text, fits, random.Random(seed))
    return [Opening(NOTHING, nothing), *found]


def opening_length(tokenizer: PreTrainedTokenizerBase, context: Context, messages: Messages) -> int:
    """Returns the number of tokens before a question, with what the chat template writes by itself."""
    whole = prompt_ids(tokenizer, [*messages, *_QUESTION])
    return len(whole) - len(prompt_ids(tokenizer, _QUESTION, context.chat_template))


def worked_examples(messages: Messages) -> tuple[Messages, list[Messages]]:
    """Splits an opening into what stands before the worked examples, and these, each up to an answer of the assistant.

    Without any answer there are no examples, and all messages stand before them.
    """
    ends = [index + 1 for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not ends:
        return list(messages), []
    first = next((index for index, message in enumerate(messages) if message["role"] != "system"), 0)
    return messages[:first], [messages[start:end] for start, end in zip([first, *ends], ends, strict=False)]


def _fewer_shots(head: Messages, shots: Sequence[Messages], fits: Callable[[Messages], bool]) -> Iterator[Opening]:
    def with_shots(count: int) -> Messages:
        return [*head, *(message for shot in shots[:count] for message in shot)]

    # Never all of them, which is the context itself.
    count = _largest(len(shots) - 1, lambda number: fits(with_shots(number)))
    if count:
        yield Opening("fewer shots", with_shots(count))
    if count > 1:
        yield Opening("one shot", with_shots(1))


def _parts(
    text: str,
    summary: str,
    room: int,
    with_text: Callable[[str], Messages],
    fits: Callable[[Messages], bool],
    draws: random.Random,
) -> Iterator[Opening]:
    """Yields what of a text fits. All cuts are between characters: between tokens, some characters would break."""

    def longest(part: Callable[[int], str], most: int) -> str:
        return part(_largest(most, lambda size: fits(with_text(part(size)))))

    truncation = longest(lambda size: text[:size], len(text))
    count = max(1, min(_MAX_CHUNKS, room // _MIN_TOKENS_PER_CHUNK))
    places = sorted(draws.random() for _ in range(count))

    def chunks(size: int) -> str:
        # In order and without overlap: each starts somewhere in what the chunks leave of the text.
        free = len(text) - count * size
        starts = [int(place * (free + 1)) + number * size for number, place in enumerate(places)]
        return "\n".join(text[start : start + size] for start in starts) if size else ""

    sampled = longest(chunks, len(text) // count)
    cut = longest(lambda size: summary[:size], len(summary))
    for name, part in {"truncation": truncation, "sampled chunks": sampled, "summary": cut}.items():
        if part:
            yield Opening(name, with_text(part))


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """Returns the largest number from 0 to `most` that fits, by bisection; 0 is taken to fit."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _text(message: dict[str, object]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""
