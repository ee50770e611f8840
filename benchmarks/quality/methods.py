"""The methods: prefixes of this project, prefix tuning of stock PEFT, and LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft import LoraConfig, PeftConfig, PrefixTuningConfig

from benchmarks.quality.dataset import Pair, answer_of, prompt_of
from peft_prefix_ext import PrefixExtConfig

TASK_WORDS = "Describe the restaurant in one natural sentence that states all of the facts."
VIRTUAL_TOKENS = 64
# For SmolLM2-135M, a virtual token has 30 layers x 2 x 3 heads x 64 = 11,520 parameters, a fifth of those of one LoRA rank on
# queries and values. 64 tokens have as many as rank 12.8.
EQUAL_RANK = 13


@dataclass(frozen=True)
class Method:
    """A PEFT method with its options.

    Args:
        name: Its name in the results.
        title: Its name in tables.
        config: The class of its config.
        options: Fields of its config. `init_exemplars` is filled with rows of the training set.
        learning_rates: The candidates for the learning rate; every method has as many.
    """

    name: str
    title: str
    config: type[PeftConfig]
    options: dict[str, Any]
    learning_rates: tuple[float, ...]

    def make_config(self, pairs: Sequence[Pair], tokenizer: str) -> PeftConfig:
        """Returns the config for a training set and the name or folder of a tokenizer."""
        fields = dict(self.options)
        if fields.get("init") == "exemplars":
            fields["init_exemplars"] = [
                {"prompt": prompt_of(pair.meaning, pair.label), "completion": answer_of(pair.sentence)}
                for pair in pairs
            ]
        if self.config is PrefixExtConfig:
            fields.setdefault("min_learning_rate", 0.0)  # a candidate is measured as it is
        if fields.get("init", "random") != "random":
            fields["tokenizer_name_or_path"] = tokenizer
        return self.config(task_type="CAUSAL_LM", **fields)


def _ours(reparam: str, init: str, learning_rates: tuple[float, ...]) -> Method:
    options: dict[str, Any] = {"num_virtual_tokens": VIRTUAL_TOKENS, "reparam": reparam, "init": init}
    if init == "text":
        options["init_text"] = TASK_WORDS
    shape = {"none": "flat", "mlp": "MLP"}[reparam]
    return Method(f"ours-{shape.lower()}-{init}", f"ours, {shape}, {init}", PrefixExtConfig, options, learning_rates)


def _stock(start: str, learning_rates: tuple[float, ...]) -> Method:
    options: dict[str, Any] = {"num_virtual_tokens": VIRTUAL_TOKENS, "prefix_projection": start == "MLP"}
    if start == "zero":
        options["init_weights"] = "zero"
    return Method(f"stock-{start.lower()}", f"PEFT prefix tuning, {start}", PrefixTuningConfig, options, learning_rates)


def _lora(rank: int, learning_rates: tuple[float, ...]) -> Method:
    options = {"r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "v_proj"]}
    return Method(f"lora-r{rank}", f"LoRA, rank {rank}", LoraConfig, options, learning_rates)


FLAT_RATES = (1e-2, 3e-2, 1e-1)
MLP_RATES = (1e-3, 2e-3, 5e-3)
LORA_RATES = (2e-3, 5e-3, 1e-2)
# PEFT initializes a flat prefix with a standard deviation of 1, which diverges at larger learning rates.
STOCK_RATES = (1e-3, 3e-3, 1e-2)

# In the order of their runs.
METHODS = (
    _ours("mlp", "exemplars", MLP_RATES),
    _lora(EQUAL_RANK, LORA_RATES),
    _stock("random", STOCK_RATES),
    _ours("mlp", "text", MLP_RATES),
    _stock("zero", FLAT_RATES),
    _ours("none", "text", FLAT_RATES),
    _ours("none", "exemplars", FLAT_RATES),
    _lora(8, LORA_RATES),
    _ours("none", "random", FLAT_RATES),
    _ours("mlp", "random", MLP_RATES),
    _stock("MLP", MLP_RATES),
)

# Ablations: one option of the first method changed at a time, compared by the loss on held-out rows, never on the test set.
# The learning rate is that of the first method.
CHANGES: dict[str, dict[str, Any]] = {
    "text": {"init": "text", "init_text": TASK_WORDS},
    "MLP of width 512": {"reparam_hidden_size": 512},
    "K and V apart": {"reparam_joint_kv": False},
    "a trunk per layer": {"reparam_shared_trunk": False},
    "two hidden layers": {"reparam_num_layers": 2},
    "first token frozen": {"num_frozen_tokens": 1},
    "16 tokens": {"num_virtual_tokens": 16},
    "128 tokens": {"num_virtual_tokens": 128},
    "prefix dropout 0.1": {"prefix_dropout": 0.1},
    "MLP dropout 0.1": {"reparam_dropout": 0.1},
    "latent of 256": {"reparam_latent_size": 256},
    "GELU": {"reparam_activation": "gelu"},
    "MLP of width 128": {"reparam_hidden_size": 128},
}


def variants(method: Method, learning_rate: float) -> list[Method]:
    """Returns a variant of the method for each of `CHANGES`."""
    return [
        replace(
            method,
            name=f"{method.name}, {title}",
            title=title,
            options={**method.options, **change},
            learning_rates=(learning_rate,),
        )
        for title, change in CHANGES.items()
    ]
