"""The report on distilled prefixes: what is left of the context, at what cost, and what else would do."""
