"""Benchmark of distillation: a short prefix against its whole context, and against what else is as short."""
