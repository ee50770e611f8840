"""The scheduler's side of a prefix: placeholders, loads, and the consequences of a failed load. No tensors."""
