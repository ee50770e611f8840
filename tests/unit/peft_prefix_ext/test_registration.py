"""`import peft_prefix_ext` registers with PEFT, and imports nothing heavy in a server."""

from __future__ import annotations

import subprocess
import sys

from helpers.prefixed import with_prefix
from helpers.tiny import tiny_model


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_reading_checkpoints_imports_neither_peft_nor_transformers_nor_vllm():
    code = (
        "import sys, peft_prefix_ext; from peft_prefix_ext import read_prefix, PrefixCheckpointError; "
        "print(sorted({'peft', 'transformers', 'vllm'} & sys.modules.keys()))"
    )
    assert run(code) == "[]"


# A process that has loaded all that PEFT imports, but neither PEFT nor us, and forks for each of its arguments: as good as
# a fresh process for each, at a tenth of the cost.
FORKS = """
import os, sys
import accelerate, bitsandbytes, torchao, transformers.masking_utils
from transformers import AutoModelForCausalLM, PreTrainedModel
assert not {"peft", "peft_prefix_ext"} & sys.modules.keys()
for first in sys.argv[1:]:
    if os.fork() == 0:
        exec(first)
        import peft
        assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType("PREFIX_EXT")].__name__ == "PrefixExtConfig"
        os._exit(0)
    assert os.wait()[1] == 0, first
    print(first)
"""


def test_any_first_import_registers():
    firsts = [
        "from peft_prefix_ext import PrefixExtConfig",
        "from peft_prefix_ext import PrefixExtModel",
        "from peft_prefix_ext.config import PrefixExtConfig; PrefixExtConfig()",
        "import peft_prefix_ext.tuner.model",
        "import peft_prefix_ext.injection.decoder_hook; import peft_prefix_ext; peft_prefix_ext.PrefixExtConfig",
        "from peft import PeftModel; import peft_prefix_ext",
        "import peft_prefix_ext; from peft import PeftModel",
        "import vllm_plugin, peft_prefix_ext; import peft",
        "import peft_prefix_ext.distillation.distill",
        "import peft_prefix_ext.distillation.companions",
        "import peft_prefix_ext.distillation.reporting.evaluation",
        "import peft_prefix_ext.generation.transformers_generator",
        "import peft_prefix_ext.conversion.verify",
    ]
    assert run(FORKS, *firsts).splitlines() == firsts


def test_peft_loads_our_adapters_after_a_bare_import(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    with_prefix(tiny_model("llama")).save_pretrained(tmp_path / "adapter")
    code = (
        "import peft_prefix_ext; from peft import PeftModel; from transformers import AutoModelForCausalLM; "
        f"base = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'base')!r}); "
        f"print(PeftModel.from_pretrained(base, {str(tmp_path / 'adapter')!r}).peft_type.value)"
    )
    assert run(code) == "PREFIX_EXT"
