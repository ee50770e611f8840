"""The tasks of the benchmark, one in each module."""
