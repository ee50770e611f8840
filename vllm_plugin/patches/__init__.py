"""All patches of vLLM's methods, and how they are installed."""
