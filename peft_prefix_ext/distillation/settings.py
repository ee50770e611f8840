"""`DistillationSettings`: everything that the result of a distillation depends on, besides model, context and questions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from peft_prefix_ext.settings import check_settings, setting

INITS = ("first", "sampled")
REPARAMS = ("mlp", "none")
# Settings that the questions and the teacher's answers depend on. Others can change without these being made again.
OF_TARGETS = ("num_questions", "max_new_tokens", "temperature", "top_k", "seed")


@dataclass(frozen=True)
class DistillationSettings:
    """The settings of a [`Distillation`]. Each is an option of `prefix-ext distill` as well, whose help describes it."""

    num_virtual_tokens: int = setting(64, "the length of the prefix, less than that of the context", least=1)
    num_questions: int = setting(128, "how many questions the base model writes, if none are given", least=3)
    num_held_out: int = setting(
        32, "how many questions are kept for early stopping and the report, a third of all at most", least=1
    )
    max_new_tokens: int = setting(128, "the length of the longest answer, in tokens", least=1)
    temperature: float = setting(0.0, "the temperature of the teacher's answers; 0 for greedy ones")
    top_k: int = setting(20, "how many log-probabilities are stored for each token of an answer", least=1)
    init: str = setting("first", "start from the first tokens of the context, or from sampled chunks", choices=INITS)
    reparam: str = setting("mlp", "train an MLP whose output is the prefix, or the prefix itself", choices=REPARAMS)
    num_frozen_tokens: int = setting(
        1, "how many tokens, from the first, are not trained: they take up attention that nothing needs", least=0
    )
    token_dropout: float = setting(0.0, "the probability that a virtual token is masked in a training step")
    learning_rate: float | None = setting(None, "the learning rate; 2e-3 with an MLP and 2e-2 without by default")
    num_epochs: float = setting(3.0, "how often each question is trained on")
    batch_size: int = setting(4, "how many questions are in a batch", least=1)
    patience: int = setting(5, "how many evaluations without progress, five in an epoch, until training stops", least=1)
    seeds: int = setting(1, "how many students are trained; the report gives their spread, the best is saved", least=1)
    on_policy_rounds: int = setting(
        0,
        "how many times the student then answers questions and learns from the teacher's view of its answers",
        least=0,
    )
    seed: int = setting(0, "the seed of all random draws", least=0)

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.temperature >= 0:
            raise ValueError(f"`temperature` must be >= 0, got {self.temperature!r}.")
        if not 0 <= self.token_dropout < 1:
            raise ValueError(f"`token_dropout` must be in [0, 1), got {self.token_dropout!r}.")
        for name in ("num_epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be > 0, got {value!r}.")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
