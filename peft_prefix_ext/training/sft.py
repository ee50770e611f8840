"""Trains a prefix on examples with TRL's `SFTTrainer`, and goes on where an earlier run stopped."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer, EarlyStoppingCallback, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from peft_prefix_ext.checkpoint.context import text_hash
from peft_prefix_ext.checkpoint.writer import check_place
from peft_prefix_ext.config import PrefixExtConfig
from peft_prefix_ext.training.arguments import defaults
from peft_prefix_ext.training.checkpoints import last_whole_checkpoint
from peft_prefix_ext.training.columns import Row
from peft_prefix_ext.training.dataset import Examples
from peft_prefix_ext.training.progress import show_loss_bar
from peft_prefix_ext.training.samples import merges
from peft_prefix_ext.training.settings import TrainSettings
from peft_prefix_ext.training.work_folder import WorkFolder

# Arguments that the trained prefix does not depend on.
_NOT_INPUTS = (
    "report_to",
    "run_name",
    "project",
    "trackio_space_id",
    "disable_tqdm",
    "logging_steps",
    "logging_strategy",
)


@dataclass(frozen=True)
class Trained:
    """What a training ended with.

    Args:
        model: The model with the best prefix.
        tokenizer: The tokenizer.
        losses: The loss on held-out examples, in nats per token: of the base model, at the start and of the prefix.
        history: What `Trainer` logged, by step.
        is_main: Whether this is the process that prints and writes.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    losses: dict[str, float]
    history: list[dict[str, Any]]
    is_main: bool


NUM_LOOKED_AT = 100
BASE, START, TRAINED = "base", "start", "trained"


def load_tokenizer(model: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a base model.

    Raises:
        ValueError: If there is none.
    """
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no base model with a tokenizer at {model!r}: give a folder, or owner/name on the Hub."
        ) from error
    return found


def train(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    out: str | Path,
    settings: TrainSettings,
    arguments: Mapping[str, Any],
    work: str | Path,
) -> Trained:
    """Trains a prefix and saves it.

    Args:
        model: The base model, a folder or a repository on the Hub.
        tokenizer: Its tokenizer.
        examples: The examples.
        out: The folder of the adapter.
        settings: The settings.
        arguments: Fields of `SFTConfig` that are to be others than by default.
        work: The folder of the checkpoints, from which the training resumes.

    Raises:
        ValueError: If something else is at `out`, or `work` is of another training.
    """
    check_place(out, ["PREFIX_EXT"])
    _warn_of_merged_tokens(examples.train, tokenizer)
    config = sft_config(examples, settings, arguments, Path(work) / "checkpoints")
    given = {name: value for name, value in arguments.items() if name not in _NOT_INPUTS}
    inputs = {"model": model, "data": digest_of(examples), **settings.to_dict(), **given}
    with PartialState().main_process_first():
        folder = WorkFolder(work, json.loads(json.dumps(inputs, default=str)), "the checkpoints of a training")
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=_dataset(examples.train),
        eval_dataset=_dataset(examples.held_out),
        processing_class=tokenizer,
        callbacks=[EarlyStoppingCallback(settings.patience)],
        peft_config=prefix_config(model, examples, settings, has_chat_template=tokenizer.chat_template is not None),
    )
    show_loss_bar(trainer)
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder.path / "checkpoints"))
    history = trainer.state.log_history
    losses = {TRAINED: float(trainer.evaluate()["eval_loss"])}
    trainer.save_model(str(out))
    prefix: Any = trainer.accelerator.unwrap_model(trainer.model)
    with prefix.disable_adapter():
        losses[BASE] = float(trainer.evaluate()["eval_loss"])
    losses[START] = next(float(each["eval_loss"]) for each in history if "eval_loss" in each)
    return Trained(prefix, tokenizer, losses, history, trainer.is_world_process_zero())


def sft_config(examples: Examples, settings: TrainSettings, arguments: Mapping[str, Any], folder: Path) -> SFTConfig:
    """Returns the arguments of `SFTTrainer`, ours where none are given.

    Raises:
        ValueError: If they do not go together.
    """
    options = {**defaults(len(examples.train), settings.reparam), **arguments, "output_dir": str(folder)}
    options["eval_on_start"] = True  # the loss at the start
    kwargs = dict(options.get("model_init_kwargs") or {})
    kwargs.setdefault("dtype", _dtype(settings))
    if settings.load_in_4bit:
        kwargs["quantization_config"] = _four_bits()
    return SFTConfig(**{**options, "model_init_kwargs": kwargs})


def prefix_config(
    model: str, examples: Examples, settings: TrainSettings, *, has_chat_template: bool
) -> PrefixExtConfig:
    """Returns the configuration of the prefix.

    Raises:
        ValueError: If `prefix_args` is no JSON object, or has unknown fields.
    """
    init = settings.init
    if init == "auto":
        init = "adapter" if settings.init_adapter else "text" if settings.init_text else "exemplars"
    sources: dict[str, dict[str, Any]] = {
        "exemplars": {"init_exemplars": examples.train},
        "text": {"init_text": settings.init_text, "init_chat_template": examples.is_chat and has_chat_template},
        "adapter": {"init_adapter": settings.init_adapter},
    }
    fields = {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": settings.num_virtual_tokens,
        "init": init,
        **sources.get(init, {}),
        "reparam": settings.reparam,
        "num_frozen_tokens": settings.num_frozen_tokens,
        "token_dropout": settings.token_dropout,
    }
    try:
        more = json.loads(settings.prefix_args or "{}")
        return PrefixExtConfig(**{**fields, **more})
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"`prefix_args` must be fields of PrefixExtConfig as JSON, got {settings.prefix_args!r} ({error})."
        ) from error


def digest_of(examples: Examples) -> str:
    """Returns the SHA-256 of the examples, in hex."""
    text = json.dumps([examples.train, examples.held_out], sort_keys=True, ensure_ascii=False, default=str)
    return text_hash(text)


def _warn_of_merged_tokens(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    looked_at = rows[:NUM_LOOKED_AT]
    merged = [row for row in looked_at if merges(row, tokenizer)]
    if merged:
        warnings.warn(
            f"In {len(merged)} of {len(looked_at)} examples the end of the prompt has other tokens with the answer behind it than "
            "alone, as requests send it: end prompts without a space, and begin answers with it.",
            stacklevel=3,
        )


def _dataset(rows: list[Row]) -> Dataset:
    return Dataset.from_list(rows)


def _dtype(settings: TrainSettings) -> str:
    # A CPU without instructions for bfloat16 takes several times as long in it.
    return settings.dtype if settings.dtype != "auto" or torch.accelerator.is_available() else "float32"


def _four_bits() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.accelerator.is_available() else torch.float32,
    )
