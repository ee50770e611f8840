"""Answers of a model with prefixes, and how probable given answers are: by transformers, or by an engine of vLLM."""
