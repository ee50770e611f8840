"""Masks and kernels for attention over a prefix and real tokens."""
