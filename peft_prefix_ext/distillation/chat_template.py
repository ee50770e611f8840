"""The chat template behind a prefix: it renders a conversation without the opening that the prefix stands for.

A chat template writes more than the messages: a default system message, a beginning-of-sequence token, the date. Behind a
prefix that holds the opening of a chat, all this would stand there twice. So an adapter brings a template of its own. It
puts the opening before the messages, renders them by the model's template, and cuts the opening off again. What would change
the opening itself, such as tools, is refused. A date in the opening stays that of the day when it was rendered:

    tokenizer.apply_chat_template(messages, chat_template=prefix.chat_template)

It is kept in the adapter's config, so that it goes wherever the adapter goes.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from peft_prefix_ext.initialization.tokens import apply_chat_template

OTHER_OPENING = (
    "This prefix stands for the opening of a chat, which tools or other arguments of the chat template would change; send the "
    "request without them, or to the base model."
)
# Two first messages of a client, which have no word in common.
_PROBES = ("Hello there.", "Why is it so?")


def render_opening(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    """Returns the opening of a chat as text, which must stand the same before whatever follows.

    Raises:
        ValueError: If there is no chat template, or what it writes for the opening depends on what follows.
    """
    rendered = apply_chat_template(tokenizer, messages, "messages")
    for probe in _PROBES:
        whole = apply_chat_template(tokenizer, [*messages, {"role": "user", "content": probe}], "messages")
        if not whole.startswith(rendered):
            raise ValueError(
                "The tokenizer's chat template renders these messages differently when a question follows, so no prefix "
                "can stand for them; end them before the user's turn, or compile their text."
            )
    return rendered


def continuation_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], rendered: str) -> str:
    """Returns the template that renders the messages after an opening, checked on a question.

    Args:
        tokenizer: The tokenizer.
        messages: The opening.
        rendered: What `render_opening` returned for it.

    Raises:
        ValueError: If the tokenizer's template cannot be wrapped.
    """
    template = tokenizer.get_chat_template()
    dates = _dates_in(tokenizer, messages)
    # The expressions keep the whitespace at both ends of the template: Jinja strips it next to a block.
    wrapped = (
        f"{_frozen(dates) if dates else ''}{{% set messages = {_literal(messages)} + messages %}}"
        f"{{% set prefix_ext_opening = {_literal(rendered)} %}}"
        f"{{% set prefix_ext_rendered %}}{{{{ '' }}}}{template}{{{{ '' }}}}{{% endset %}}"
        "{% if not prefix_ext_rendered.startswith(prefix_ext_opening) %}"
        f"{{{{ raise_exception({_literal(OTHER_OPENING)}) }}}}{{% endif %}}"
        "{{ prefix_ext_rendered[prefix_ext_opening|length:] }}"
    )
    for probe in _PROBES:
        question = [{"role": "user", "content": probe}]
        whole = tokenizer.apply_chat_template([*messages, *question], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(
            question, chat_template=wrapped, tokenize=False, add_generation_prompt=True
        )
        parts, joined = (
            tokenizer(text, add_special_tokens=False).input_ids for text in ([rendered, str(after)], str(whole))
        )
        if rendered + str(after) != whole or [*parts[0], *parts[1]] != joined:
            raise ValueError(
                "The tokenizer's chat template cannot be wrapped for a prefix, since what it writes for a question depends on "
                "the messages before it; compile the text itself."
            )
    return wrapped


def _dates_in(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> dict[str, str]:
    """Returns the dates that the template writes before and behind an opening, by the format it asks for."""
    found: dict[str, str] = {}

    def strftime_now(format: str) -> str:
        return found.setdefault(format, datetime.now().strftime(format))

    question = {"role": "user", "content": _PROBES[0]}
    for each in (messages, [*messages, question]):
        tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True, strftime_now=strftime_now)
    return found


def _frozen(dates: dict[str, str]) -> str:
    """Returns a macro in the place of the function `strftime_now`, which templates get from transformers and from vLLM."""
    return f"{{%- macro strftime_now(format) %}}{{{{ {_literal(dates)}[format] }}}}{{% endmacro %}}"


def _literal(value: Any) -> str:
    """Returns messages as a Jinja literal, which is JSON but for its constants."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if value is None:
        return "none"
    # Characters as they are: Jinja does not join the two halves of an escaped emoji.
    return json.dumps(value, ensure_ascii=False)
