"""Benchmark of serving: prefixes against cached text, the base model, LoRA and `PeftModel.generate`."""
