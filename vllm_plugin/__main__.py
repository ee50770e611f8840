"""`python -m vllm_plugin` is `prefix-serve`."""

from vllm_plugin.prefix_serve import main

if __name__ == "__main__":
    main()
