"""What a prefix records of the adapters that its base model had besides it, such as LoRA: it is wrong without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class BaseAdapter(NamedTuple):
    """An adapter that was at work in the base model when a prefix was saved.

    Args:
        name: What it was called there; it may be called otherwise elsewhere.
        peft_type: Its type in PEFT, such as `LORA`.
        digest: SHA-256, in hex, of its weights as PEFT saves them in `adapter_model.safetensors`; `None` where they were
            not at hand, as those of a sharded model are not.
        base_model_name_or_path: What it was trained on itself, as PEFT records it.
        rounded_digest: The same of the weights rounded to bfloat16, in which they may have been loaded since.
    """

    name: str
    peft_type: str
    digest: str | None = None
    base_model_name_or_path: str | None = None
    rounded_digest: str | None = None

    def __str__(self) -> str:
        digest = f" (sha256 {self.digest[:16]})" if self.digest else ""
        return f"{self.peft_type} adapter {self.name!r}{digest}"

    def is_like(self, other: BaseAdapter) -> bool:
        """Whether it could be the same adapter as `other`, whatever they are called."""
        digests = [(self.digest, other.digest), (self.rounded_digest, other.rounded_digest)]
        known = [one == another for one, another in digests if one and another]
        return self.peft_type == other.peft_type and (any(known) or not known)


def read_base_adapters(rows: list[dict[str, Any]]) -> tuple[BaseAdapter, ...]:
    """Returns what the `base_adapters` of an `adapter_config.json` are.

    Raises:
        ValueError: If a row is malformed.
    """
    adapters = []
    for row in rows if isinstance(rows, list) else [rows]:
        named = {name: row[name] for name in BaseAdapter._fields if name in row} if isinstance(row, dict) else {}
        required = named.get("name"), named.get("peft_type")
        if not all(isinstance(value, str) for value in required) or not all(
            isinstance(value, (str, type(None))) for value in named.values()
        ):
            raise ValueError(f"`base_adapters` must be a list of dicts with {BaseAdapter._fields}, got {row!r}.")
        adapters.append(BaseAdapter(**named))
    return tuple(adapters)


def are_alike(some: Sequence[BaseAdapter], others: Sequence[BaseAdapter]) -> bool:
    """Whether these could be the same adapters, in whatever order."""
    order = [
        sorted(adapters, key=lambda adapter: (adapter.peft_type, adapter.rounded_digest or adapter.digest or ""))
        for adapters in (some, others)
    ]
    return len(some) == len(others) and all(one.is_like(other) for one, other in zip(*order, strict=True))


def model_with(adapters: Sequence[BaseAdapter]) -> str:
    """Returns the phrase for a base model with these adapters."""
    return f"the base model with {' and '.join(map(str, adapters))}" if adapters else "the base model alone"
