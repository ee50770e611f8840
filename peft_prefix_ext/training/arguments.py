"""Arguments of the command line and of a YAML file, ours and those of TRL's `SFTConfig`, and what they are by default."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from trl import SFTConfig, TrlParser

from peft_prefix_ext.training.processes import needs_cpu
from peft_prefix_ext.tuner.learning_rate import RECOMMENDED

# Few rows are repeated until they make so many steps, unless early stopping ends them before.
MIN_STEPS = 100
MAX_EPOCHS = 20
FEW_ROWS = 200
_UNSET = object()


def parse(
    words: Sequence[str], prog: str, add_options: Callable[[argparse.ArgumentParser], None]
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parses the words of a command, and the file that `--config FILE` names.

    Args:
        words: The words behind the command.
        prog: What stands before them, for error messages.
        add_options: Adds the command's own options to a parser.

    Returns:
        The command's own options, and the fields of `SFTConfig` that were given.

    Raises:
        ValueError: If the file cannot be read, or has unknown keys.
        SystemExit: For unknown options.
    """
    usage = f"{prog} DATA --model BASE --out DIR [OPTION ...]; see {prog} --help"  # all options would fill a page
    parser = TrlParser(SFTConfig, prog=prog, usage=usage, allow_abbrev=False, add_help=False)  # type: ignore[arg-type]
    # The folder of the checkpoints is the command's business.
    parser.set_defaults(output_dir=None)
    add_options(parser)
    words, config = _without_config(list(words), parser)
    unknown = parser.set_defaults_with_config(**config)
    if unknown:
        raise ValueError(
            f"The config file has keys that are no arguments: {', '.join(unknown[::2])}.".replace("--", "")
        )
    names = {each.name for each in fields(SFTConfig) if each.init}
    unset = argparse.Namespace(**dict.fromkeys(names - config.keys(), _UNSET))
    found, rest = parser.parse_known_args(words, namespace=unset)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    given = {name: value for name in names if (value := getattr(found, name)) is not _UNSET}
    own = argparse.Namespace(**{name: value for name, value in vars(found).items() if name not in names})
    return own, given


def defaults(num_rows: int, reparam: str) -> dict[str, Any]:
    """Returns the arguments of `SFTConfig` that are others than TRL's unless they are given.

    Args:
        num_rows: The number of examples to train on.
        reparam: How the prefix is parameterized.
    """
    batch_size = 4 if num_rows < FEW_ROWS else 8
    steps_per_epoch = max(1, -(-num_rows // batch_size))
    on_accelerator = not needs_cpu()
    return {
        "use_cpu": not on_accelerator,
        "learning_rate": RECOMMENDED[reparam],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.0,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "num_train_epochs": min(MAX_EPOCHS, max(3, -(-MIN_STEPS // steps_per_epoch))),
        "eval_strategy": "steps",
        "eval_steps": 0.1,
        "save_strategy": "steps",
        "save_steps": 0.1,
        "save_total_limit": 2,
        "logging_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "restore_callback_states_from_checkpoint": True,
        "prediction_loss_only": True,
        "report_to": "none",
        # They save memory at the cost of time, and a CPU has no lack of it.
        "gradient_checkpointing": on_accelerator,
        "bf16": on_accelerator and torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "dataloader_pin_memory": on_accelerator,
    }


def _without_config(words: list[str], parser: argparse.ArgumentParser) -> tuple[list[str], dict[str, Any]]:
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--config":
            rest = words[index + 1 :] if equals else words[index + 2 :]
            if not equals:
                if index + 1 == len(words):
                    parser.error("argument --config: expected one argument")
                value = words[index + 1]
            return words[:index] + rest, _read_config(value)
    return words, {}


def _read_config(path: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"The config file {path} cannot be read: {reason}") from error
    if not isinstance(found, dict):
        raise ValueError(f"The config file {path} must hold names with values.")
    return {str(name).replace("-", "_"): value for name, value in found.items()}
