"""What the tests of the training half share."""

from __future__ import annotations

import pytest
from tiny import VOCABULARY, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def word_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tokenizer that knows the words w2, w3, ... and starts every text with its <s>."""
    vocabulary = {"<pad>": 0, "<s>": 1, **{f"w{number}": number for number in range(2, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>").save_pretrained(folder)
    return str(folder)


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
