"""Trains a prefix with rollouts of a vLLM engine in this process, or of a server.

    python rollouts.py FOLDER grpo|rloo|online-dpo [URL]

FOLDER holds `base`. Prints a line of JSON: what was logged at each step, and for each version of the prefix that the engine had,
the largest difference between its log-probabilities and the trainer's.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from statistics import mean

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_CI_ENV": "1"}
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1"}

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, RLOOConfig
from trl.experimental.online_dpo import OnlineDPOConfig
from vllm import SamplingParams

from peft_prefix_ext import PrefixExtConfig
from peft_prefix_ext.trl import GRPOTrainer, OnlineDPOTrainer, RLOOTrainer, with_frozen_reference

PROMPTS = Dataset.from_list([{"prompt": f"w{3 + index} w4 w{5 + index % 3}"} for index in range(16)])
COMMON = {
    "max_steps": 4,
    "per_device_train_batch_size": 8,
    "learning_rate": 0.05,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_vllm": True,
    "gradient_checkpointing": False,
}
ENGINE = {"enforce_eager": True, "max_model_len": 96, "block_size": 32, "kv_cache_memory_bytes": 1 << 28}


def reward(completions: list[str], **columns: object) -> list[float]:
    """The mean number of the words, w0 to w127, from 0 to 1."""
    return [mean([int(word.strip("w")) for word in text.split()] or [0]) / 128 for text in completions]


def trainer_of(name: str, model: torch.nn.Module, tokenizer: object, folder: Path, url: str | None) -> object:
    where = {"vllm_mode": "server", "vllm_server_base_url": url} if url else {"vllm_mode": "colocate"}
    common = {**COMMON, **where, "output_dir": str(folder / "run")}
    options = {"train_dataset": PROMPTS, "processing_class": tokenizer, "reward_funcs": reward}
    options |= {"vllm_prefix_folder": str(folder)} if url else {"vllm_engine": ENGINE}
    if name == "online-dpo":
        return OnlineDPOTrainer(model, args=OnlineDPOConfig(**common, max_new_tokens=8, max_length=32), **options)
    groups = {"num_generations": 4, "max_completion_length": 8, "beta": 0.01}
    if name == "rloo":
        return RLOOTrainer(model, args=RLOOConfig(**common, **groups), **options)
    return GRPOTrainer(model, args=GRPOConfig(**common, **groups), **options)


def logprobs_of(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def difference(trainer: object, tokenizer: object) -> float:
    """The engine's log-probabilities of an answer that it samples, against the trainer's of the same answer."""
    prompt = tokenizer(PROMPTS[0]["prompt"]).input_ids
    if trainer.args.vllm_mode == "colocate":
        holder = trainer if isinstance(trainer, OnlineDPOTrainer) else trainer.vllm_generation
        params = SamplingParams(max_tokens=8, logprobs=0)
        output = holder.llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0].outputs[0]
        answer = output.token_ids
        engine = [row[token].logprob for row, token in zip(output.logprobs, answer, strict=True)]
    else:
        _, (answer,), (rows,), _ = trainer.vllm_generation.generate([prompt], None, 1)
        engine = [row[0] for row in rows]
    model = trainer.model
    was_training = model.training
    model.eval()
    found = logprobs_of(model, list(prompt), list(answer))
    model.train(was_training)
    return float((torch.tensor(engine) - found).abs().max())


def main(folder: Path, name: str, url: str | None = None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    torch.manual_seed(0)
    config = PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=40, init_std=0.5)
    model = with_frozen_reference(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
    trainer = trainer_of(name, model, tokenizer, folder, url)
    differences = []
    place, method = (
        (trainer, "_move_model_to_vllm") if name == "online-dpo" else (trainer.vllm_generation, "sync_weights")
    )
    sync = getattr(place, method)

    def checked() -> None:
        sync()
        differences.append(difference(trainer, tokenizer))

    setattr(place, method, checked)
    trainer.train()
    print(json.dumps({"history": trainer.state.log_history, "differences": differences}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
