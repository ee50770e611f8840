"""Prefixes in other people's trainers, by the hooks that these have for plugins: a module for each, which it imports."""
