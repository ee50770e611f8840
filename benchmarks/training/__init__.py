"""Benchmark of training: time and memory of one step of each method, side by side."""
