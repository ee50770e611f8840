"""The generator in vLLM where vLLM is missing. With it: tests/integration/serving/test_vllm_generator.py."""

from __future__ import annotations

import subprocess
import sys

from peft_prefix_ext.generation.vllm_engine import is_vllm_available

WITHOUT_VLLM = """
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.partition(".")[0] == "vllm" else find(name, *rest))

from peft_prefix_ext.generation.vllm_engine import is_vllm_available
from peft_prefix_ext.generation.vllm_generator import VLLMGenerator

print(is_vllm_available(), "vllm_plugin" in sys.modules)
VLLMGenerator("model")
"""


def test_without_vllm_it_says_what_to_install() -> None:
    assert is_vllm_available()
    done = subprocess.run([sys.executable, "-c", WITHOUT_VLLM], capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr
    assert done.stderr.splitlines()[-1].startswith("ImportError: vLLM is not installed; install")
