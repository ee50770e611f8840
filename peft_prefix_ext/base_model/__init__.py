"""The base model: its attention layers, its cache argument, and where its weights are."""
