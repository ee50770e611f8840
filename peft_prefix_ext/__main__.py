"""`python -m peft_prefix_ext` is `prefix-ext`."""

from peft_prefix_ext.cli.parser import main

if __name__ == "__main__":
    main()
