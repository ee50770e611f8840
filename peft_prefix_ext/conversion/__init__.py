"""Converts adapters: to and from stock PEFT, several prefixes to one, keys to other positions."""
