"""`import peft_prefix_ext` is enough for PEFT, and costs a server nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
from prefixed import with_prefix
from tiny import tiny_model


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_reading_checkpoints_imports_neither_peft_nor_transformers_nor_vllm():
    code = (
        "import sys, peft_prefix_ext; from peft_prefix_ext import read_prefix, PrefixCheckpointError; "
        "print(sorted({'peft', 'transformers', 'vllm'} & sys.modules.keys()))"
    )
    assert run(code) == "[]"


@pytest.mark.parametrize(
    "first",
    [
        "from peft_prefix_ext import PrefixExtConfig",
        "from peft_prefix_ext import PrefixExtModel",
        "from peft_prefix_ext.config import PrefixExtConfig; PrefixExtConfig()",
        "import peft_prefix_ext.model",
        "import peft_prefix_ext.runtime; import peft_prefix_ext; peft_prefix_ext.PrefixExtConfig",
        "from peft import PeftModel; import peft_prefix_ext",
        "import peft_prefix_ext; from peft import PeftModel",
        "import transformers, vllm_plugin, peft_prefix_ext; import peft",
    ],
)
def test_any_first_import_registers(first):
    code = f"{first}\nimport peft; print(peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType('PREFIX_EXT')].__name__)"
    assert run(code) == "PrefixExtConfig"


def test_peft_loads_our_adapters_after_a_bare_import(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    with_prefix(tiny_model("llama")).save_pretrained(tmp_path / "adapter")
    for first, second in [("peft_prefix_ext", "peft"), ("peft", "peft_prefix_ext")]:
        code = (
            f"import {first}; import {second}; from peft import PeftModel; from transformers import AutoModelForCausalLM; "
            f"base = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'base')!r}); "
            f"print(PeftModel.from_pretrained(base, {str(tmp_path / 'adapter')!r}).peft_type.value)"
        )
        assert run(code) == "PREFIX_EXT"
