"""Benchmark of overhead: startup, first requests, run-time loading and memory of a server with many adapters."""
