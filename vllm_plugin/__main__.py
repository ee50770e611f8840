"""`python -m vllm_plugin` is `prefix-serve`."""

from vllm_plugin.prefix_serve import main

# A process that vLLM spawns then imports this file first, as it imports the script `prefix-serve`: Python skips a
# `__main__` that it knows by its module's name.
__spec__ = None

if __name__ == "__main__":
    main()
