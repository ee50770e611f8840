"""Supervised training from a data set by one command: what `prefix-ext train` and `prefix-ext evaluate` do."""
