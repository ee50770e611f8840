"""The folder to name in PEFT-Factory's `PEFT_DIR`: it has a folder for each method, of that name, with two files."""
