"""Benchmark of overhead: the CPU time of a prefix in vLLM's front end and scheduler, without the model."""
