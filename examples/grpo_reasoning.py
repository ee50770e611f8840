"""Trains a prefix by GRPO on a procedural task of reasoning-gym, with rollouts of vLLM, and draws the reward.

    python examples/grpo_reasoning.py                        # words of three letters backwards, on SmolLM2-135M
    python examples/grpo_reasoning.py --task chain_sum --model BASE --steps 200

The prefix starts from a few solved problems, so that some answers are right and there is something to reinforce. Needs `pip install -e ".[rl]"` and vLLM. Leaves the prefix, the log and `reward.png` in `--out`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import reasoning_gym
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import GRPOConfig

from peft_prefix_ext import PrefixExtConfig
from peft_prefix_ext.trl import GRPOTrainer

# Of tasks that are otherwise too hard for a small model.
OPTIONS = {
    "spell_backward": {"min_word_len": 3, "max_word_len": 3},
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_args(arguments)
    set_seed(options.seed)
    task = OPTIONS.get(options.task, {})
    problems = reasoning_gym.create_dataset(options.task, size=options.size, seed=options.seed, **task)
    solved = reasoning_gym.create_dataset(options.task, size=options.num_virtual_tokens, seed=options.seed + 1, **task)
    rows = [{"prompt": [user(each)], "index": index} for index, each in enumerate(problems)]
    shots = [{"messages": [user(each), {"role": "assistant", "content": each["answer"]}]} for each in solved]

    def reward(completions: list[Any], index: list[int], **columns: Any) -> list[float]:
        """The task's own score of each answer, from 0 to 1."""
        answers = [completion[0]["content"].strip() for completion in completions]
        return [problems.score_answer(answer, problems[number]) for answer, number in zip(answers, index, strict=True)]

    dtype = "auto" if torch.cuda.is_available() else "float32"
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    config = PrefixExtConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=options.num_virtual_tokens,
        init_exemplars=shots,
    )
    engine = {"max_model_len": 512} if torch.cuda.is_available() else {"max_model_len": 512, "enforce_eager": True}
    trainer = GRPOTrainer(
        get_peft_model(base, config),
        reward_funcs=reward,
        args=GRPOConfig(
            str(options.out / "checkpoints"),
            use_vllm=True,
            vllm_mode="colocate",
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=2,
            per_device_train_batch_size=options.batch_size,
            num_generations=options.num_generations,
            max_completion_length=options.max_completion_length,
            max_steps=options.steps,
            gradient_checkpointing=False,
            bf16=torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=options.seed,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        vllm_engine=engine,
    )
    trainer.train()
    trainer.save_model(str(options.out))
    history = [row for row in trainer.state.log_history if "reward" in row]
    (options.out / "history.json").write_text(json.dumps(history, indent=1))
    rewards = [row["reward"] for row in history]
    plot(rewards, options.out / "reward.png", options.task)
    part = max(1, len(rewards) // 5)
    print(
        f"Mean reward of the first {part} steps: {fmean(rewards[:part]):.3f}, of the last: {fmean(rewards[-part:]):.3f}"
    )


def user(problem: dict[str, Any]) -> dict[str, str]:
    return {"role": "user", "content": problem["question"]}


def plot(rewards: Sequence[float], path: Path, task: str) -> None:
    """Draws the reward by step, with the mean of five."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(rewards, color="lightgray")
    smooth = [fmean(rewards[max(0, index - 4) : index + 1]) for index in range(len(rewards))]
    axes.plot(smooth, color="tab:blue")
    axes.set(xlabel="step", ylabel="mean reward", title=task)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="the base model")
    parser.add_argument("--task", default="spell_backward", help="of reasoning-gym (default: spell_backward)")
    parser.add_argument("--out", type=Path, default=Path("grpo"), help="the folder of the prefix (default: grpo)")
    parser.add_argument("--size", type=int, default=500, help="number of problems (default: 500)")
    parser.add_argument("--steps", type=int, default=60, help="default: 60")
    parser.add_argument("--batch-size", type=int, default=32, help="answers in a step (default: 32)")
    parser.add_argument("--num-generations", type=int, default=8, help="answers to a problem (default: 8)")
    parser.add_argument("--max-completion-length", type=int, default=8, help="tokens of an answer (default: 8)")
    parser.add_argument("--num-virtual-tokens", type=int, default=128, help="default: 128")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="default: 1e-3")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
