"""The LoRA adapter that a prefix was trained on, and the LoRA request that goes with every request for the prefix.

A prefix records its base adapters with the digest of their weights (`peft_prefix_ext/checkpoint/base_adapters.py`).
PEFT saves them together in one folder: the adapter called "default" in the folder itself, every other one in a
subfolder of its name. The LoRA adapter is looked for there, and identified by the digest of its weights.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peft_prefix_ext.checkpoint.base_adapters import BaseAdapter, model_with
from peft_prefix_ext.checkpoint.format import CONFIG_NAME, WEIGHTS_NAME, PrefixCheckpoint
from peft_prefix_ext.checkpoint.regular_file import MAX_WEIGHTS_BYTES, open_regular
from vllm_plugin.adapters.file_state import FileState, state_of
from vllm_plugin.adapters.spec import PrefixSpec
from vllm_plugin.errors import PrefixServeError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

# vLLM identifies LoRA adapters by a number of 31 bits. A server numbers its own from 1 upwards.
_FIRST_ID = 1 << 30
_digests: dict[int, str] = {}


def find_base_lora(name: str, checkpoint: PrefixCheckpoint, vllm_config: Any) -> dict[str, str]:
    """Returns the fields of a `PrefixSpec` that name the LoRA adapter the prefix was trained on; {} if it needs none.

    Raises:
        PrefixServeError: If this engine cannot serve both, or the LoRA adapter cannot be found.
    """
    if not checkpoint.base_adapters:
        return {}
    from vllm.lora.peft_helper import PEFTHelper

    told = f"Prefix adapter {name!r} was trained on {model_with(checkpoint.base_adapters)}"
    base_adapter = checkpoint.base_adapters[0]
    merge = "merge what is below the prefix into the model (`merge_and_unload`), and save both again"
    if len(checkpoint.base_adapters) > 1 or base_adapter.peft_type != "LORA":
        raise PrefixServeError(f"{told}, and the server takes one LoRA adapter below a prefix; {merge}.")
    if vllm_config.lora_config is None:
        raise PrefixServeError(
            f"{told}, and the server has the base model alone; start it with --enable-lora, or {merge}."
        )
    if base_adapter.digest is None:
        raise PrefixServeError(
            f"{told}, whose weights were not recorded; load both in one process and save them again."
        )
    folders = list(_folders(checkpoint.path, base_adapter))
    folder = next((folder for folder in folders if _digest(folder / WEIGHTS_NAME) == base_adapter.digest), None)
    if folder is None:
        searched = ", ".join(map(str, folders))
        raise PrefixServeError(f"{told}, and it lies in none of {searched}; keep both as `save_pretrained` wrote them.")
    try:
        helper = PEFTHelper.from_local_dir(str(folder), vllm_config.model_config.max_model_len)
        helper.validate_legal(vllm_config.lora_config)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise PrefixServeError(f"{told}, which this server cannot load: {error}") from error
    # The config holds the scale of the weights, so it is part of the digest.
    digest = hashlib.sha256(f"{base_adapter.digest}{_digest(folder / CONFIG_NAME)}".encode()).hexdigest()
    return {"lora_path": str(folder.resolve()), "lora_digest": digest}


def request_for(spec: PrefixSpec) -> LoRARequest | None:
    """Returns the LoRA request that goes with a request for this prefix; None if the prefix needs no LoRA adapter.

    Raises:
        PrefixServeError: If two different LoRA adapters would get the same number.
    """
    from vllm.lora.request import LoRARequest

    if spec.lora_path is None or spec.lora_digest is None:
        return None
    # Derived from the digest, so that all processes agree. vLLM keys blocks by name and path: other weights are another
    # LoRA adapter.
    number = _FIRST_ID + int(spec.lora_digest, 16) % _FIRST_ID
    if _digests.setdefault(number, spec.lora_digest) != spec.lora_digest:
        raise PrefixServeError(
            f"The LoRA below prefix adapter {spec.name!r} cannot be told from another one by its number; train it a little "
            "further and save it again."
        )
    return LoRARequest(f"prefix-adapter-lora:{spec.lora_digest}", number, spec.lora_path)


def check(params: Any, vllm_config: Any) -> None:
    """Raises `PrefixRequestError` for requests that would crash the engine: on CPU, vLLM's LoRA code supports no prompt
    log-probabilities."""
    if vllm_config.lora_config is None or getattr(params, "prompt_logprobs", None) is None:
        return
    from vllm.platforms import current_platform

    from vllm_plugin.request_errors import PrefixRequestError

    if current_platform.is_cpu():
        raise PrefixRequestError(
            "Log-probabilities of the prompt are not supported on CPU with --enable-lora; leave out `prompt_logprobs`, or "
            "`echo` with `logprobs`."
        )


def confuses_slots() -> bool:
    """Returns whether this vLLM applies the LoRA adapter in its last slot to requests without LoRA.

    It does so on CPU before 0.33 (vLLM #48421).
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    from vllm.lora.ops.torch_ops import bgmv_shrink

    output = torch.zeros(1, 1)
    bgmv_shrink(torch.ones(1, 1), torch.ones(1, 1, 1, 1), output, torch.tensor([-1]))
    return bool(output.any())


async def load(engine: Any, specs: Iterable[PrefixSpec]) -> None:
    """Loads the LoRA adapters of these prefixes into a running engine, as vLLM does with LoRA modules.

    Args:
        engine: vLLM's `AsyncLLM`.
        specs: The prefixes.

    Raises:
        PrefixServeError: If the engine cannot load one of them.
    """
    for request, name in {request: spec.name for spec in specs if (request := request_for(spec))}.items():
        try:
            await engine.add_lora(request)
        except Exception as error:
            # The error comes from another process and may be of any type; its last line says most.
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise PrefixServeError(
                f"The LoRA in {request.lora_path}, below the prefix adapter {name!r}, cannot be loaded: {reason[-1]}"
            ) from error


def _folders(prefix: Path, base_adapter: BaseAdapter) -> Iterator[Path]:
    """Yields the folders where PEFT may have saved the LoRA adapter of a prefix."""
    # The name comes from a file. It must be the name of a folder, and not a path.
    if Path(base_adapter.name).name == base_adapter.name != "..":
        yield prefix / base_adapter.name
        yield prefix.parent / base_adapter.name
    yield prefix.parent


def _digest(path: Path) -> str | None:
    """Returns the SHA-256 of a file, which many prefixes may share; None if it cannot be read."""
    state = state_of(path)
    # A file that has changed just now may change again, and look the same.
    digest = _digest_of_state if state is not None and state.is_settled else _digest_of_state.__wrapped__
    try:
        return digest(path, state)
    except OSError:
        return None


@functools.lru_cache(maxsize=1024)
def _digest_of_state(path: Path, state: FileState | None) -> str:
    with open_regular(path, MAX_WEIGHTS_BYTES) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
