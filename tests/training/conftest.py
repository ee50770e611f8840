"""What the tests of the training half share."""

from __future__ import annotations

import pytest
from tiny import tiny_model
from transformers import AutoTokenizer, PreTrainedModel

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
