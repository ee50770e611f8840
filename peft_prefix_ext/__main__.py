"""`python -m peft_prefix_ext` runs `prefix-ext`."""

from peft_prefix_ext.cli import main

if __name__ == "__main__":
    main()
