"""Checks and speed on an NVIDIA GPU: kernels, right answers, serving, training; one process per step."""
