"""The LoRA that a prefix was trained on: where it lies, and the request for it that goes with every request for the prefix.

A prefix records the adapters below it, with the digest of their weights (`peft_prefix_ext/base_adapters.py`). Saved
together, they lie in one folder: the adapter called "default" in the folder itself, each other one in a subfolder of its
name. That is where LoRA is looked for, and its weights tell whether it is the one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peft_prefix_ext.checkpoint.base_adapters import BaseAdapter, model_with
from peft_prefix_ext.checkpoint.format import CONFIG_NAME, WEIGHTS_NAME, PrefixCheckpoint
from vllm_plugin.errors import PrefixServeError, request_error_type

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from vllm_plugin.adapters.spec import PrefixSpec

# vLLM tells LoRAs apart by number, of 31 bits. A server counts those of its own up from 1.
_FIRST_ID = 1 << 30
_digests: dict[int, str] = {}


def find_base_lora(name: str, checkpoint: PrefixCheckpoint, vllm_config: Any) -> dict[str, str]:
    """Returns the fields of a `PrefixSpec` that say on which LoRA the prefix `name` was trained; {} if on the base alone.

    Raises:
        PrefixServeError: If this engine cannot serve them together, or the LoRA is not there.
    """
    if not checkpoint.base_adapters:
        return {}
    from vllm.lora.peft_helper import PEFTHelper

    told = f"Prefix adapter {name!r} was trained on {model_with(checkpoint.base_adapters)}"
    below = checkpoint.base_adapters[0]
    merge = "merge what is below the prefix into the model (`merge_and_unload`), and save both again"
    if len(checkpoint.base_adapters) > 1 or below.peft_type != "LORA":
        raise PrefixServeError(f"{told}, and the server takes one LoRA adapter below a prefix; {merge}.")
    if vllm_config.lora_config is None:
        raise PrefixServeError(
            f"{told}, and the server has the base model alone; start it with --enable-lora, or {merge}."
        )
    if below.digest is None:
        raise PrefixServeError(
            f"{told}, whose weights were not recorded; load both in one process and save them again."
        )
    folders = list(_folders(checkpoint.path, below))
    folder = next((folder for folder in folders if _digest(folder / WEIGHTS_NAME) == below.digest), None)
    if folder is None:
        looked = ", ".join(map(str, folders))
        raise PrefixServeError(f"{told}, and it lies in none of {looked}; keep both as `save_pretrained` wrote them.")
    try:
        helper = PEFTHelper.from_local_dir(str(folder), vllm_config.model_config.max_model_len)
        helper.validate_legal(vllm_config.lora_config)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise PrefixServeError(f"{told}, which this server cannot load: {error}") from error
    # The scale of the weights is in its config.
    digest = hashlib.sha256(f"{below.digest}{_digest(folder / CONFIG_NAME)}".encode()).hexdigest()
    return {"lora_path": str(folder.resolve()), "lora_digest": digest}


def request_for(spec: PrefixSpec) -> LoRARequest | None:
    """Returns what a request with this prefix asks vLLM's LoRA code for; None if the prefix stands on the base alone.

    Raises:
        PrefixServeError: If two different LoRAs would have one number.
    """
    from vllm.lora.request import LoRARequest

    if spec.lora_path is None or spec.lora_digest is None:
        return None
    # The same in all processes. vLLM keys blocks by name and path: other weights are another LoRA.
    number = _FIRST_ID + int(spec.lora_digest, 16) % _FIRST_ID
    if _digests.setdefault(number, spec.lora_digest) != spec.lora_digest:
        raise PrefixServeError(
            f"The LoRA below prefix adapter {spec.name!r} cannot be told from another one by its number; save it again "
            "from a continued training."
        )
    return LoRARequest(f"prefix-adapter-lora:{spec.lora_digest}", number, spec.lora_path)


def check(params: Any, vllm_config: Any) -> None:
    """Raises `PrefixRequestError` for what would end the engine: on CPU, vLLM's LoRA code takes sampled tokens only."""
    if vllm_config.lora_config is None or getattr(params, "prompt_logprobs", None) is None:
        return
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        raise request_error_type()(
            "Log-probabilities of the prompt are not supported on CPU with --enable-lora; leave out `prompt_logprobs`, or "
            "`echo` with `logprobs`."
        )


def confuses_slots() -> bool:
    """Whether this vLLM gives requests without LoRA the one in its last slot: on CPU, before 0.33 (vLLM #48421)."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    from vllm.lora.ops.torch_ops import bgmv_shrink

    output = torch.zeros(1, 1)
    bgmv_shrink(torch.ones(1, 1), torch.ones(1, 1, 1, 1), output, torch.tensor([-1]))
    return bool(output.any())


async def load(engine: Any, specs: Iterable[PrefixSpec]) -> None:
    """Has a running engine load the LoRA of each prefix that stands on one, as vLLM does with LoRA modules.

    Args:
        engine: vLLM's `AsyncLLM`.

    Raises:
        PrefixServeError: If it cannot.
    """
    for request, name in {request: spec.name for spec in specs if (request := request_for(spec))}.items():
        try:
            await engine.add_lora(request)
        except Exception as error:
            # It comes from another process, as whatever that process makes of it.
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise PrefixServeError(
                f"The LoRA in {request.lora_path}, below the prefix adapter {name!r}, cannot be loaded: {reason[-1]}"
            ) from error


def _folders(prefix: Path, below: BaseAdapter) -> Iterator[Path]:
    """Yields where PEFT may have saved LoRA, relative to the prefix that was saved with it."""
    # It comes from a file: nothing but the name of a folder.
    if Path(below.name).name == below.name:
        yield prefix / below.name
        yield prefix.parent / below.name
    yield prefix.parent


def _digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
