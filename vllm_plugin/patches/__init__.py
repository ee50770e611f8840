"""Every wrap of vLLM: what it expects of a method, and when it is put on."""
