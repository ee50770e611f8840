"""The model card of a repository with prefixes: what they are, how they were initialized, how to serve them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel

from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.injection.tuner_layer import PrefixTunerLayer

CARD_NAME = "README.md"
TAGS = ("peft-prefix-ext", "prefix-tuning")
# The marks before and behind what is written here.
SECTION_START, SECTION_END = "<!-- peft-prefix-ext -->", "<!-- /peft-prefix-ext -->"
# The title of the template of PEFT and transformers, which says nothing about the model.
_TEMPLATE_TITLE = "# Model Card for Model ID"


def write_card(model: PeftModel, folder: str | Path, repo: str | None = None) -> None:
    """Adds the prefixes of `model` to the card that PEFT wrote into `folder`.

    Replaces the template, and keeps all other text, such as a card by the user or by `Trainer`.

    Args:
        model: The model.
        folder: The folder of the card.
        repo: The repository that the folder is about to be uploaded to, if known.
    """
    path = Path(folder) / CARD_NAME
    card = ModelCard.load(path, ignore_metadata_errors=True)
    configs = {name: config for name, config in model.peft_config.items() if isinstance(config, PrefixExtConfig)}
    name: Any = model.get_base_model().name_or_path or None
    # PEFT writes a relative path as it was given; the adapters record the absolute one.
    base = next((config.base_model_name_or_path for config in configs.values() if config.base_model_name_or_path), name)
    if base and card.data.base_model in (None, name):
        card.data.base_model = base
    tags = [
        f"base_model:adapter:{base}" if tag == f"base_model:adapter:{name}" else tag for tag in card.data.tags or []
    ]
    card.data.tags = sorted({*tags, *TAGS})
    sections = [_section(model, name, config, base or "BASE", repo) for name, config in configs.items()]
    text = "\n".join([SECTION_START, *sections, SECTION_END])
    if replaced := put_section(card.text, text, SECTION_START, SECTION_END):
        card.text = replaced
    elif _TEMPLATE_TITLE in card.text:
        versions = card.text.rpartition("### Framework versions")
        card.text = "\n".join([f"# {_name(repo) or 'A prefix'}", "", text, "", versions[1] + versions[2]])
    else:
        card.text = f"{card.text.rstrip()}\n\n{text}\n"
    card.save(path)


def put_section(card: str, section: str, start: str, end: str) -> str | None:
    """Returns the text of a card with a section in the place of what stands between two marks, `None` if they are not there.

    Args:
        card: The text of the card.
        section: The new section, with its marks.
        start: The mark before it.
        end: The mark behind it.
    """
    before, found_start, rest = card.partition(start)
    _, found_end, after = rest.partition(end)
    return before + section + after if found_start and found_end else None


def add_section(folder: str | Path, section: str, start: str, end: str) -> None:
    """Puts a section into the card of an adapter, behind what is written here, in place of an earlier one with the same marks.

    It stays there when the adapter is saved into this folder again.

    Args:
        folder: The folder of the adapter.
        section: The section.
        start: The mark to put before it.
        end: The mark to put behind it.
    """
    path = Path(folder) / CARD_NAME
    card = ModelCard.load(path, ignore_metadata_errors=True) if path.is_file() else ModelCard("")
    text = "\n".join([start, section, end])
    before, found, after = card.text.partition(SECTION_END)
    card.text = put_section(card.text, text, start, end) or (
        f"{before}{found}\n\n{text}{after}" if found else f"{card.text.rstrip()}\n\n{text}\n"
    )
    card.save(path)


def _name(repo: str | None) -> str | None:
    return repo.rpartition("/")[2] if repo else None


def _section(model: PeftModel, name: str, config: PrefixExtConfig, base: str, repo: str | None) -> str:
    saved = config.to_dict()
    rows = saved["prefix_layers"] or []
    is_encoder_decoder = bool((saved["base_fingerprint"] or {}).get("is_encoder_decoder"))
    served = sum(math.prod(row[shape]) for row in rows for shape in ("key_shape", "value_shape"))
    trained = _num_trained(model, name)
    also_trained = [f"`{module}`" for module in config.modules_to_save or []]
    if config.trainable_token_indices is not None:
        also_trained.append("embeddings of some tokens")
    reparam = f"`{config.reparam}`, folded into the K/V when saved" if config.reparam != "none" else "`none`"
    facts = {
        "base model": f"`{base}`",
        "task": f"`{config.task_type}`" if config.task_type else None,
        "attention with a prefix": ", ".join(config.attentions) if is_encoder_decoder else None,
        "virtual tokens": f"{config.num_virtual_tokens}, the first {config.num_frozen_tokens} frozen"
        if config.num_frozen_tokens
        else config.num_virtual_tokens,
        "starts as": config.init_report,
        "reparameterization": reparam,
        "parameters in training": f"{trained:,}" if trained else None,
        "parameters of the prefix": f"{served:,} (the K/V of {len(rows)} layers)",
        "on top of": _others(model),
        "trained with it": ", ".join(also_trained) or None,
    }
    folder = "" if name == "default" else f"/{name}"
    source = f"{repo or 'PATH_OR_REPO'}{folder}"
    serving = f"""
Serve it with [vLLM](https://github.com/vllm-project/vllm) (`pip install ".[serve]"` in a clone of peft-prefix-ext) together
with the base model:

```bash
vllm serve {base} --prefix-adapter {(_name(repo) if name == "default" else name) or "NAME"}={source}
```
"""
    if is_encoder_decoder:
        serving = "\nvLLM does not serve it: the base model is an encoder-decoder model.\n"
    elif also_trained or _others(model):
        serving = "\nvLLM cannot serve it as it is: it needs more than the base model and the prefix.\n"
    table = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items() if value is not None)
    return f"""
## Prefix `{name}`

Trained keys and values that precede the input in every attention layer; the base model is unchanged.

| | |
| --- | --- |
{table}
{serving}
Load it with [PEFT](https://github.com/huggingface/peft) and peft-prefix-ext (`pip install .` in a clone of it, or
`pip install` its wheel):

```python
import peft_prefix_ext  # tells PEFT of the type PREFIX_EXT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "{source}")
```

`KeyError: 'PREFIX_EXT'` means that nothing imported `peft_prefix_ext` in that process. `prefix-ext run` imports it and then
runs any Python program, given as a command, `SCRIPT.py` or `-m MODULE`:

```bash
prefix-ext run lm_eval --model hf --model_args pretrained={base},peft={source} --tasks TASK
```
"""


def _num_trained(model: PeftModel, name: str) -> int:
    """Returns the number of trainable parameters of an adapter."""
    return sum(
        parameter.numel()
        for module in model.modules()
        if isinstance(module, PrefixTunerLayer)
        for key, parameter in module.named_parameters()
        if parameter.requires_grad and name in key.split(".")
    )


def _others(model: PeftModel) -> str | None:
    others: dict[str, Any] = {
        name: config for name, config in model.peft_config.items() if not isinstance(config, PrefixExtConfig)
    }
    return ", ".join(f"`{name}` ({config.peft_type.value})" for name, config in others.items()) or None
