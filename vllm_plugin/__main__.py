"""`python -m vllm_plugin MODEL --prefix-adapter NAME=PATH ...` is `prefix-serve MODEL ...`."""

from vllm_plugin.prefix_serve import main

if __name__ == "__main__":
    main()
