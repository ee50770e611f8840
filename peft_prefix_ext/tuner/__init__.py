"""The PEFT method: adds prefixes to a model, saves and loads them."""
