"""What a prefix records about the other adapters of its base model, such as LoRA; without them it is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class BaseAdapter(NamedTuple):
    """An adapter that was active in the base model when a prefix was saved.

    Args:
        name: Its name in that model; other models may use another name.
        peft_type: Its type in PEFT, such as `LORA`.
        digest: SHA-256, in hex, of its weights as PEFT saves them in `adapter_model.safetensors`; `None` if they were not
            available, as in a sharded model.
        base_model_name_or_path: The model that it was trained on, as PEFT records it.
        rounded_digest: The same for the weights rounded to bfloat16, in case they are loaded in bfloat16.
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
        """Whether it may be the same adapter as `other`, under any name."""
        digests = [(self.digest, other.digest), (self.rounded_digest, other.rounded_digest)]
        known = [one == another for one, another in digests if one and another]
        return self.peft_type == other.peft_type and (any(known) or not known)


def read_base_adapters(rows: list[dict[str, Any]]) -> tuple[BaseAdapter, ...]:
    """Reads the `base_adapters` of an `adapter_config.json`.

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
    """Whether these may be the same adapters, in any order."""
    order = [
        sorted(adapters, key=lambda adapter: (adapter.peft_type, adapter.rounded_digest or adapter.digest or ""))
        for adapters in (some, others)
    ]
    return len(some) == len(others) and all(one.is_like(other) for one, other in zip(*order, strict=True))


def model_with(adapters: Sequence[BaseAdapter]) -> str:
    """Returns a phrase for a base model with these adapters."""
    return f"the base model with {' and '.join(map(str, adapters))}" if adapters else "the base model alone"
