"""The method `prefixext` of PEFT-Factory. `prefix_ext` is the name that PEFT knows, and can register once only."""
