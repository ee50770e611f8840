"""Reinforcement learning by TRL with rollouts from vLLM: its trainers, whose `use_vllm=True` works with a prefix.

    from peft_prefix_ext.trl import GRPOTrainer  # in the place of `from trl import GRPOTrainer`

The engine holds the base model once. After each update the prefix alone goes there, in place of the one before; no weights are
merged or copied.
"""

from peft_prefix_ext.trl.reference import with_frozen_reference
from peft_prefix_ext.trl.trainers import GRPOTrainer, OnlineDPOTrainer, RLOOTrainer

__all__ = ["GRPOTrainer", "OnlineDPOTrainer", "RLOOTrainer", "with_frozen_reference"]
