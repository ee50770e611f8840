"""`DistillationSettings`: everything that the result of a distillation depends on."""

from __future__ import annotations

from dataclasses import dataclass, fields

INITS = ("first", "sampled")
ENGINES = ("auto", "transformers", "vllm")


@dataclass(frozen=True)
class DistillationSettings:
    """
    The settings of [`distill`].

    Args:
        num_virtual_tokens (`int`):
            The length p of the student. It must be shorter than the context.
        num_questions (`int`):
            How many questions the base model writes, if none are given.
        num_held_out (`int`):
            How many questions are not trained on: for early stopping and for the report. At most a third of all.
        max_new_tokens (`int`):
            The length of the longest answer.
        temperature (`float`):
            The temperature of the teacher's answers; 0 for greedy ones.
        top_k (`int`):
            How many of the teacher's most probable tokens are stored for each token of an answer.
        init (`str`):
            What the student starts from: the `"first"` tokens of the context, or chunks of it, `"sampled"` at random.
        reparam (`str`):
            As in [`PrefixExtConfig`].
        num_frozen_tokens (`int`):
            How many tokens of the student keep their initial K/V: the first one takes up attention that nothing needs.
        token_dropout (`float`):
            As in [`PrefixExtConfig`].
        learning_rate (`float`, *optional*):
            2e-3 with an MLP and 2e-2 without one by default.
        num_epochs (`float`):
            How often each question is trained on.
        batch_size (`int`):
            Questions in a batch.
        patience (`int`):
            How many evaluations may go by without progress on the held-out questions until training stops; there are five in
            an epoch.
        seeds (`int`):
            How many students are trained, each with a seed of its own. The report gives their spread; the one that is
            nearest to the teacher on the held-out questions is kept.
        on_policy_rounds (`int`):
            How many times the student then answers questions and learns from what the teacher says of its answers.
        seed (`int`):
            The seed of everything that is drawn at random.
    """

    num_virtual_tokens: int = 64
    num_questions: int = 128
    num_held_out: int = 32
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 20
    init: str = "first"
    reparam: str = "mlp"
    num_frozen_tokens: int = 1
    token_dropout: float = 0.0
    learning_rate: float | None = None
    num_epochs: float = 3.0
    batch_size: int = 4
    patience: int = 5
    seeds: int = 1
    on_policy_rounds: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, minimum in _LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ValueError(f"`{name}` must be an integer >= {minimum}, got {value!r}.")
        if not self.temperature >= 0:
            raise ValueError(f"`temperature` must be >= 0, got {self.temperature!r}.")
        if not self.num_epochs > 0:
            raise ValueError(f"`num_epochs` must be > 0, got {self.num_epochs!r}.")
        if self.init not in INITS:
            raise ValueError(f"`init` must be one of {INITS}, got {self.init!r}.")

    def to_dict(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


_LEAST = {
    "num_virtual_tokens": 1,
    "num_questions": 2,
    "num_held_out": 1,
    "max_new_tokens": 1,
    "top_k": 1,
    "num_frozen_tokens": 0,
    "batch_size": 1,
    "patience": 1,
    "seeds": 1,
    "on_policy_rounds": 0,
    "seed": 0,
}
# Settings that the questions and the teacher's answers depend on. Others can change without these being made again.
OF_TARGETS = ("num_questions", "max_new_tokens", "temperature", "top_k", "seed")
