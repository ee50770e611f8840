"""The scheduler's side: placeholders, loads, and what a failed load may not leave behind. No tensors."""
