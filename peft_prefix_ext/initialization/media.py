"""Images, audio and video in what a prefix starts from: a text cannot stand for them, a cache can."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

MEDIA = ("image", "video", "audio")
# The columns of data sets for vision-language models, as TRL's `SFTTrainer` takes them.
_COLUMNS = tuple(column for kind in MEDIA for column in (kind, f"{kind}s"))


def placeholder_tokens(model: PreTrainedModel) -> set[int]:
    """Returns the ids of the tokens in whose place a model puts images, videos and audio; empty for a model of text."""
    names = [f"{kind}_token_{number}" for kind in MEDIA for number in ("id", "index")]
    found = (getattr(model.config, name, None) for name in names)
    return {token for token in found if isinstance(token, int)}


def refuse_placeholders(token_ids: Iterable[int], model: PreTrainedModel, init: str) -> None:
    """Raises `ValueError` if the tokens of `init` have a placeholder, which without its medium is a meaningless token."""
    if found := sorted(placeholder_tokens(model) & set(token_ids)):
        raise ValueError(
            f"What `init={init!r}` starts from has a placeholder for an image, video or audio in it (token {found[0]}): "
            "leave it out, or give the cache of a prompt with its media as `init_kv`."
        )


def refuse_media(row: Mapping[str, Any], name: str) -> None:
    """Raises `ValueError` if a row of a dataset has media, in a column of their own or in its messages."""
    column = next((column for column in _COLUMNS if _is_given(row.get(column))), None)
    messages = [message for value in row.values() if isinstance(value, list) for message in value]
    parts = [part for message in messages if isinstance(message, dict) for part in _parts(message)]
    kinds = {str(part.get("type")) for part in parts if isinstance(part, dict)} - {"text"}
    if column is not None or kinds:
        raise ValueError(
            f"`{name}` has {column or sorted(kinds)[0]!r} in it, and `init_exemplars` takes text alone: leave it out, or give "
            "the cache of a prompt with its media as `init_kv`."
        )


def _parts(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _is_given(value: Any) -> bool:
    return value is not None and not (isinstance(value, (list, tuple, str)) and not value)
