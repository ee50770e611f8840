"""Fixtures of the tests of the training half."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version
from peft import LoraConfig
from transformers import AutoTokenizer, PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION

from helpers.tiny import tiny_model

TEMPLATE = (
    "{% for message in messages %}{{ {'user': 'w91', 'assistant': 'w92', 'system': 'w93'}[message['role']] }} "
    "{{ message['content'] }} w8 {% endfor %}"
)


@pytest.fixture(scope="session")
def chat_tokenizer(word_tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the same tokenizer with a chat template, and w2 as the end of a sequence."""
    tokenizer = AutoTokenizer.from_pretrained(word_tokenizer)
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, "w2"
    folder = str(tmp_path_factory.mktemp("chat"))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def methods_of_transformers() -> None:
    """What transformers itself has for adapters, `add_adapter` and the like, if it takes this PEFT at all.

    5.24 asks for PEFT 0.22, which is not out: whatever the adapter, it refuses. Loading by the Auto classes works.
    """
    if Version(MIN_PEFT_VERSION) > Version(version("peft")):
        with pytest.raises(ValueError, match="version of PEFT"):
            tiny_model("llama").add_adapter(LoraConfig(target_modules=["q_proj"]))
        pytest.skip(f"this transformers wants PEFT {MIN_PEFT_VERSION}, for LoRA as well")
