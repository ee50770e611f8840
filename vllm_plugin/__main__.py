"""`python -m vllm_plugin MODEL --prefix-adapter NAME=PATH ...` is `prefix-serve MODEL ...`."""

from vllm_plugin.launcher import main

if __name__ == "__main__":
    main()
