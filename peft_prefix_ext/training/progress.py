"""One progress bar with the loss, in place of a line for each step."""

from __future__ import annotations

from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer


class LossBar(ProgressCallback):
    """A progress bar that shows the loss beside the time that is left.

    Args:
        label: What the loss is called.
    """

    def __init__(self, label: str = "loss") -> None:
        super().__init__()
        self.label = label

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix({self.label: f"{float(logs['loss']):.3f}"})


def show_loss_bar(trainer: Trainer, label: str = "loss") -> None:
    """Puts a `LossBar` in the place of the callbacks that print each step."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(LossBar(label))
