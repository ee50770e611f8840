"""`prefix-ext`: one module per command."""

from peft_prefix_ext.cli.parser import main

__all__ = ["main"]
