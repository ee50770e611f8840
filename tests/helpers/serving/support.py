"""Tiny models, adapters and reference outputs for tests of serving, without downloads and without the training code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache

from helpers.tiny import VOCABULARY as VOCAB_SIZE
from helpers.tiny import tiny_config
from peft_prefix_ext.checkpoint.fingerprint import fingerprint
from peft_prefix_ext.checkpoint.format import CONFIG_NAME, WEIGHTS_NAME, layer_key
from vllm_plugin.adapters.registry import registry_in
from vllm_plugin.adapters.spec import PrefixSpec

BLOCK_SIZE = 32
# vLLM supports heads of 32 and more on CPU.
_SERVED = {"intermediate_size": 128, "head_dim": 32, "max_position_embeddings": 1024, "eos_token_id": 2}
Prefix = list[tuple[torch.Tensor, torch.Tensor]]

WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(VOCAB_SIZE - 3))]


def llama_config(**overrides: Any) -> PreTrainedConfig:
    """Returns the config of a two-layer Llama with grouped-query attention."""
    return tiny_config("llama", **{**_SERVED, "num_hidden_layers": 2, "pad_token_id": None, **overrides})


def gemma3_config(**overrides: Any) -> PreTrainedConfig:
    """Returns the config of a small Gemma 3: five sliding-window layers of 64 tokens, one full one."""
    fields = {"num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 32}
    windows = {"sliding_window": 64, "sliding_window_pattern": 6}
    return tiny_config("gemma3", **{**_SERVED, **fields, **windows, **overrides})


def write_model(folder: Path, config: Any, *, tokenizer: bool = False, seed: int = 0) -> Path:
    """Saves a random float32 model with weights large enough that its outputs depend on its inputs."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=weight.shape[1] ** -0.5 * (2.0 if "q_proj" in name or "k_proj" in name else 1.0))
    model.save_pretrained(folder)
    if tokenizer:
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Saves a tokenizer of whole words, `w0 w1 ...`, with a chat template that joins the messages."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for message in messages %}{{ message['content'] }} {% endfor %}",
    ).save_pretrained(folder)


def random_prefix(config: Any, num_virtual_tokens: int, *, seed: int = 0) -> Prefix:
    """Returns random K/V per layer, `[num_kv_heads, num_virtual_tokens, head_dim]` each."""
    generator = torch.Generator().manual_seed(seed)
    shape = (config.num_key_value_heads, num_virtual_tokens, config.head_dim)
    return [
        (torch.randn(shape, generator=generator) * 1.5, torch.randn(shape, generator=generator) * 1.5)
        for _ in range(config.num_hidden_layers)
    ]


def write_adapter(folder: Path, config: Any, prefix: Prefix, **overrides: Any) -> Path:
    """Saves a prefix in the on-disk format; `overrides` replace fields of its config."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, rows = {}, []
    for index, (key, value) in enumerate(prefix):
        module = f"model.layers.{index}.self_attn"
        tensors[layer_key(module, "key")], tensors[layer_key(module, "value")] = key, value
        rows.append({"index": index, "module": module, "key_shape": list(key.shape), "value_shape": list(value.shape)})
    save_file(tensors, folder / WEIGHTS_NAME)
    fields = {
        "peft_type": "PREFIX_EXT",
        "format_version": 1,
        "num_virtual_tokens": prefix[0][0].shape[1],
        "prefix_layers": rows,
        "base_model_name_or_path": "tiny",
        "base_fingerprint": fingerprint(config),
        **overrides,
    }
    (folder / CONFIG_NAME).write_text(json.dumps(fields), encoding="utf-8")
    return folder


def prompt_ids(length: int, *, seed: int = 0) -> list[int]:
    """Returns `length` random token ids, none of them special."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()


def text_of(token_ids: Sequence[int]) -> str:
    """Returns the text that the tokenizer of `write_tokenizer` encodes to these ids."""
    return " ".join(WORDS[index] for index in token_ids)


class Reference:
    """Greedy decoding by transformers, with the prefix as past key/values."""

    def __init__(self, model_folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int], prefix: Prefix | None) -> torch.Tensor:
        """Returns the logits at every position of `token_ids`: `[len(token_ids), vocab_size]`."""
        cache, p = DynamicCache(config=self.model.config), 0
        if prefix is not None:
            p = prefix[0][0].shape[1]
            for index, (key, value) in enumerate(prefix):
                cache.update(key[None], value[None], index)
        ids = torch.tensor([list(token_ids)])
        positions = torch.arange(p, p + ids.shape[1])
        return self.model(
            ids,
            past_key_values=cache,
            position_ids=positions[None],
            attention_mask=torch.ones(1, p + ids.shape[1], dtype=torch.long),
        ).logits[0]

    def greedy(self, token_ids: Sequence[int], prefix: Prefix | None, max_tokens: int) -> list[int]:
        """Returns `max_tokens` greedy tokens, ignoring the end of the sequence and without a cache between steps."""
        tokens = list(token_ids)
        for _ in range(max_tokens):
            tokens.append(int(self.logits(tokens, prefix)[-1].argmax()))
        return tokens[len(token_ids) :]

    def beams(self, token_ids: Sequence[int], prefix: Prefix | None, width: int, max_tokens: int) -> list[list[int]]:
        """Returns the best `width` outputs of a beam search that ignores the end of the sequence."""
        beams: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(max_tokens):
            candidates = [
                (score + float(scores[token]), [*output, int(token)])
                for score, output in beams
                for scores in [self.logits([*token_ids, *output], prefix)[-1].log_softmax(-1)]
                for token in scores.topk(2 * width).indices
            ]
            beams = sorted(candidates, key=lambda beam: -beam[0])[:width]
        return [output for _, output in beams]


def specs_in(kv_transfer_config: Any) -> dict[str, PrefixSpec]:
    """Returns the current adapters of an engine by name; {} for an engine without prefixes."""
    registry = registry_in(kv_transfer_config)
    return {} if registry is None else {adapter.spec.name: adapter.spec for adapter in registry.adapters()}
