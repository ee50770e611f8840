"""Prefixes for a model that sees images and for a model with recurrent layers: trained, served, and asked over HTTP.

    python examples/vision_and_hybrid.py        # tiny random models, made on the spot
    python examples/vision_and_hybrid.py --vision Qwen/Qwen2.5-VL-3B-Instruct --hybrid ibm-granite/granite-4.0-h-350m

The prefix of the first learns the names of colours from pictures. That of the second learns which colour a thing has; it
trains the states that recurrent layers start from beside the K/V of the attention layers. Prints the answers of base models
and prefixes, then the results as one line of JSON. Fails if a token of a server differs from `PeftModel.generate`.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from report import table
from serve import BASE, MAX_NEW_TOKENS, Answer, Question, Server
from tiny_models import save_hybrid, save_vision_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from peft_prefix_ext import PrefixExtConfig

NAME = "colours"  # of both prefixes
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}
THINGS = {"tomato": "red", "blood": "red", "grass": "green", "frog": "green", "sky": "blue", "lemon": "yellow"}
WORDS = ["What", "colour", "has", "this", "?", *COLOURS, *THINGS]
NUM_VIRTUAL_TOKENS, LEARNING_RATE = 16, 2e-2
# vLLM's Mamba-2 layers cannot keep states for its prefix cache on a CPU yet (0.32).
HYBRID_OPTIONS = () if torch.cuda.is_available() else ("--no-enable-prefix-caching",)


@dataclass(frozen=True)
class Task:
    """A model and what its prefix learns: a chat for each row, and its answer."""

    model: Path | str
    chats: list[list[dict[str, Any]]]
    answers: list[str]
    sees_images: bool


def main() -> int:
    args = parse_args()
    disable_progress_bar()
    output: Path = args.output.absolute()
    pictures = [[chat(image_part(colour), "What colour has this ?")] for colour in COLOURS]
    things = [[chat(f"What colour has {thing} ?")] for thing in THINGS]
    tasks = {
        "vision": Task(
            args.vision or save_vision_model(output / "vision-model", WORDS), pictures, list(COLOURS), sees_images=True
        ),
        "hybrid": Task(
            args.hybrid or save_hybrid(output / "hybrid-model", WORDS), things, list(THINGS.values()), sees_images=False
        ),
    }
    results: dict[str, dict[str, Any]] = {}
    for name, task in tasks.items():
        print(f"\n== {name}: {task.model} ==")
        folder = output / f"{name}-{NAME}"
        first, last = train(task, folder, args.steps)
        print(f"loss {first:.2f} before training, {last:.2f} after {args.steps} steps")
        questions = [Question(model, tuple(messages)) for model in (BASE, NAME) for messages in task.chats]
        options = () if task.sees_images else HYBRID_OPTIONS
        with Server(str(task.model), {NAME: folder}, output / f"{name}.log", options) as server:
            served = server.ask(questions, "over HTTP")
        expected = generate(task, folder, questions)
        equal = sum(one.token_ids == other.token_ids for one, other in zip(served, expected, strict=True))
        count = len(task.answers)
        base, prefixed = ([answer.text for answer in part] for part in (served[:count], served[count:]))
        rows = list(zip(task.answers, base, prefixed, strict=True))
        print(table(("right answer", "base model", "prefix"), rows))
        print(f"{equal} of {len(served)} answers have the same tokens as PeftModel.generate")
        results[name] = {
            "loss": [round(first, 3), round(last, 3)],
            "right": {BASE: count_right(base, task), NAME: count_right(prefixed, task)},
            "equal": equal,
            "questions": len(served),
        }
    print(json.dumps(results))
    return 0 if all(result["equal"] == result["questions"] for result in results.values()) else 1


def chat(*parts: Any) -> dict[str, Any]:
    """Returns a user's message of texts and images, in OpenAI's form."""
    content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


def image_part(colour: str) -> dict[str, Any]:
    """Returns a plain picture as a part of a message."""
    buffer = io.BytesIO()
    picture(colour).save(buffer, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (112, 112), COLOURS[colour])


def load(task: Task) -> Any:
    auto_class: Any = AutoModelForImageTextToText if task.sees_images else AutoModelForCausalLM
    return auto_class.from_pretrained(task.model, dtype=torch.float32)


def encode(task: Task, messages: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Returns the inputs of the model for a chat, as the server makes them."""
    reader: Any = (AutoProcessor if task.sees_images else AutoTokenizer).from_pretrained(task.model)
    inputs = reader.apply_chat_template(
        [{**message, "content": [_as_transformers(part) for part in message["content"]]} for message in messages],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return dict(inputs)


def _as_transformers(part: dict[str, Any]) -> dict[str, Any]:
    """Returns a part of a message in transformers' form, which has images as objects."""
    if part["type"] == "text":
        return part
    data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
    return {"type": "image", "image": Image.open(io.BytesIO(data))}


def train(task: Task, folder: Path, steps: int) -> tuple[float, float]:
    """Trains a prefix on all rows and saves it; returns the first and the last loss."""
    torch.manual_seed(0)
    config = PrefixExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM_VIRTUAL_TOKENS, init="vocab", reparam="none")
    model = get_peft_model(load(task), config)
    model.print_trainable_parameters()
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    rows = []
    for messages, answer in zip(task.chats, task.answers, strict=True):
        inputs = encode(task, messages)
        target = tokenizer(answer, add_special_tokens=False, return_tensors="pt").input_ids
        target = torch.cat([target, torch.tensor([[tokenizer.eos_token_id]])], 1)
        prompt = inputs["input_ids"]
        inputs |= {
            "input_ids": torch.cat([prompt, target], 1),
            "attention_mask": torch.ones(1, prompt.shape[1] + target.shape[1], dtype=torch.long),
            "labels": torch.cat([torch.full_like(prompt, -100), target], 1),
        }
        if "mm_token_type_ids" in inputs:
            types = inputs["mm_token_type_ids"]
            inputs["mm_token_type_ids"] = torch.cat([types, types.new_zeros(1, target.shape[1])], 1)
        rows.append(inputs)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE, weight_decay=0.0)
    losses = []
    for _ in (bar := tqdm(range(steps), desc="train")):
        loss = torch.stack([model(**row).loss for row in rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.2f}")
    model.save_pretrained(str(folder))
    return losses[0], losses[-1]


@torch.inference_mode()
def generate(task: Task, folder: Path, questions: Sequence[Question]) -> list[Answer]:
    """Returns PEFT's answers, with the prefix or without it."""
    model = PeftModel.from_pretrained(load(task), folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    answers = []
    for question in tqdm(questions, desc="PeftModel.generate"):
        inputs = encode(task, question.messages)
        with model.disable_adapter() if question.model == BASE else nullcontext():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        prompt = inputs["input_ids"][0].tolist()
        token_ids = output[0, len(prompt) :].tolist()
        text = str(tokenizer.decode(token_ids, skip_special_tokens=True))
        answers.append(Answer(text.strip(), tuple(token_ids), tuple(prompt)))
    return answers


def count_right(answers: Sequence[str], task: Task) -> int:
    return sum(answer.lower().rstrip(".") == right for answer, right in zip(answers, task.answers, strict=True))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision", metavar="MODEL", help="a vision-language model (default: a tiny random one)")
    parser.add_argument("--hybrid", metavar="MODEL", help="a model with recurrent layers (default: a tiny random one)")
    parser.add_argument("--steps", type=int, default=100, help="training steps of each prefix (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(".demo/vision-and-hybrid"), help="where to write")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
