"""Load test: many clients on one server while adapters are replaced, unloaded and loaded; every answer is checked."""
