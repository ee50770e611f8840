"""Masks and kernels for attention over a prefix and the real tokens."""
