"""From one form of adapter to another: stock PEFT's, several prefixes as one, keys at other positions."""
