"""What an engine knows of one prefix, and how a request carries it there.

vLLM is imported on use only.
"""

from __future__ import annotations

import dataclasses
import functools

import msgspec

# The namespace of our cache salts. A client's own salt may not start with it.
SALT_PREFIX = "prefix-adapter:"


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixSpec:
    """What the engine knows of one prefix, without its tensors.

    Args:
        name: The name that requests use.
        source: Folder or Hub repository, as the operator gave it.
        path: The local folder it was read from.
        num_virtual_tokens: p.
        digest: SHA-256 of its weights and config, in hex; empty until its values are read, with its first request.
        lora_path: The local folder of the LoRA adapter that it was trained on, if any.
        lora_digest: SHA-256 of that LoRA adapter's weights and config, in hex.
        draft: The prefix of the draft model that goes with it, of the same length, if the operator named one.
        opening: Tells the chat template of the messages behind it from others; None if it stands for no opening of a chat.
        pinned: Whether it is the last to make room for others, on the device and in the KV cache.
    """

    name: str
    source: str
    path: str
    num_virtual_tokens: int
    digest: str
    lora_path: str | None = None
    lora_digest: str | None = None
    draft: PrefixSpec | None = None
    opening: str | None = None
    pinned: bool = False

    @property
    def content(self) -> str:
        """What its blocks hold: also the K/V of the draft model, and so that model's prefix."""
        return self.digest if self.draft is None else f"{self.digest}+{self.draft.digest}"

    def salt(self, client_salt: str | None) -> str:
        """Returns the salt of the block hashes. Prefixes of another content, name or client salt share no block."""
        return f"{SALT_PREFIX}{self.content}:{len(self.name)}:{self.name}:{client_salt or ''}"


# Cached: packing and unpacking run once per request, and the result is the same for all requests with one prefix.
@functools.lru_cache(maxsize=4096)
def pack(spec: PrefixSpec) -> bytes:
    """Returns the spec as bytes, which cost next to nothing to send to the engine and to decode there."""
    return msgspec.msgpack.encode(spec)


@functools.lru_cache(maxsize=4096)
def unpack(packed: bytes) -> PrefixSpec:
    """Returns the spec that `pack` encoded."""
    return msgspec.msgpack.decode(packed, type=PrefixSpec)
