"""The scheduler's side of a prefix: placeholders, loads, and failed loads. No tensors."""
