"""Self-study: the base model writes the questions itself, from chunks of a text or after worked examples.

The five kinds of requests about a text are those of Cartridges (arXiv 2506.06266): a student that has only answered
questions of one kind knows little of the rest of the text.
"""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from peft_prefix_ext.distillation.context import Context
from peft_prefix_ext.distillation.questions import Question
from peft_prefix_ext.generation.generator import Generator, TokenIds
from peft_prefix_ext.generation.prompts import prompt_ids

CHUNK_TOKENS = 384
QUESTION_TOKENS = 64
TEMPERATURE = 0.8
# Of attempts to questions: many are the same, or none.
MOST_ATTEMPTS = 4
KINDS = {
    "question": "Write one question that the text above answers. Name what it asks about. Write only the question.",
    "summary": "Write one short request to summarize a part of the text above. Name that part. Write only the request.",
    "structure": "Write one short request to list facts of the text above. Name the facts. Write only the request.",
    "use": "Write one practical question that a reader of the text above could have. Write only the question.",
    "creative": "Write one short request to do something new with facts of the text above. Write only the request.",
}
_CONTENT = "prefix-ext-content"


def write_questions(
    generator: Generator, tokenizer: PreTrainedTokenizerBase, context: Context, number: int, seed: int, prefix: str
) -> list[Question]:
    """Returns up to `number` different questions to a context.

    To worked examples these are their own inputs and new ones that the model takes for the next turn of the user. To a text
    they are requests about chunks of it.

    Args:
        generator: The base model.
        tokenizer: Its tokenizer.
        context: The context, the opening of a chat.
        number: How many.
        seed: The seed of all draws.
        prefix: The name of the compiled context in `generator`.

    Raises:
        ValueError: If the model wrote none that can be used.
    """
    examples = [str(message["content"]) for message in context.messages if message["role"] == "user"]
    found = dict.fromkeys(examples)
    for attempt in range(MOST_ATTEMPTS):
        missing = number - len(found)
        if missing <= 0:
            break
        if examples:
            texts = _next_turns(generator, tokenizer, context, missing, seed + attempt, prefix)
        else:
            texts = _requests(generator, tokenizer, context, missing, seed + attempt)
        found.update(dict.fromkeys(filter(_is_usable, texts)))
    if not found:
        raise ValueError(
            "The base model wrote no question that can be used; give questions of your own with `--queries FILE`."
        )
    return [Question([{"role": "user", "content": text}]) for text in list(found)[:number]]


def chunks(tokenizer: PreTrainedTokenizerBase, text: str, size: int = CHUNK_TOKENS) -> list[str]:
    """Returns the text in parts of at most `size` tokens."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return [str(tokenizer.decode(ids[start : start + size])).strip() for start in range(0, len(ids), size)]


def _requests(
    generator: Generator, tokenizer: PreTrainedTokenizerBase, context: Context, number: int, seed: int
) -> list[str]:
    draw = random.Random(seed)
    parts = chunks(tokenizer, "\n\n".join(str(message["content"]) for message in context.messages))
    kinds = list(KINDS.values())
    prompts = [
        prompt_ids(tokenizer, [{"role": "user", "content": f"{draw.choice(parts)}\n\n{kinds[index % len(kinds)]}"}])
        for index in range(number)
    ]
    answers = generator.generate(prompts, max_new_tokens=QUESTION_TOKENS, temperature=TEMPERATURE, seed=seed)
    return [_first_line(str(tokenizer.decode(answer, skip_special_tokens=True))) for answer in answers]


def _next_turns(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    context: Context,
    number: int,
    seed: int,
    prefix: str,
) -> list[str]:
    """Lets the model write the user's next turn, which it has seen examples of."""
    turn = [{"role": "user", "content": _CONTENT}]
    rendered = str(tokenizer.apply_chat_template(turn, chat_template=context.chat_template, tokenize=False))
    header, _, footer = rendered.partition(_CONTENT)
    prompt: TokenIds = list(tokenizer(header, add_special_tokens=False).input_ids)
    answers = generator.generate(
        [prompt] * number, max_new_tokens=QUESTION_TOKENS, prefix=prefix, temperature=TEMPERATURE, seed=seed
    )
    texts = (str(tokenizer.decode(answer, skip_special_tokens=not footer.strip())) for answer in answers)
    # A turn without its end is half a turn. Templates may write more behind the end where no answer follows.
    end = next(iter(footer.split()), "")
    return [text.partition(end)[0].strip() for text in texts if not end or end in text]


def _first_line(text: str) -> str:
    """Returns the first line of an answer, without the number or the quotes that small models write around it."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line.lstrip("-*0123456789.) ").strip("\"'“” ")


def _is_usable(text: str) -> bool:
    return 2 <= len(text.split()) <= QUESTION_TOKENS
