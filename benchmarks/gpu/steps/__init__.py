"""The steps, each a program of its own that writes its result to a file: `python -m benchmarks.gpu.steps.NAME --help`."""
