"""What the server says is what training saw: token for token in float32, for every architecture, length and cache state.

One engine per architecture serves ten prefixes of ours, two of stock PEFT and the base model; each batch mixes them all.
The references are `PeftModel.generate`, one request at a time.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import DynamicCache, PreTrainedModel
from vllm import SamplingParams

from helpers.prefixed import perturb, with_prefix
from helpers.serving.engines import start
from helpers.tiny import random_ids, tiny_model
from vllm_plugin import PrefixAdapterRequest, prefix_adapters

NEW_TOKENS = 24
PROMPT_LENGTHS = (3, 40, 71)  # the windows of the sliding layers are 24
# The CPU engine has no kernel for heads smaller than 32.
ARCHITECTURES = {
    "llama": {"head_dim": 32},
    "qwen2": {"hidden_size": 128},
    "qwen3": {},
    "gemma3": {},
    "mistral": {"head_dim": 32},
}

STOCK = {
    "stock45": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=45),
    "cartridge34": CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=34, num_frozen_tokens=2),
}


def prefixes(base: PreTrainedModel, folder: Path, tokenizer: str) -> dict[str, dict]:
    """Names and configs of prefixes of every initialisation and form of reparameterization.

    Lengths are around those of the engine's blocks, of 32 tokens.
    """
    cache = DynamicCache()
    with torch.no_grad():
        base(input_ids=random_ids(1, 7), past_key_values=cache)
    words = " ".join(f"w{number}" for number in range(3, 45))
    text = {"tokenizer_name_or_path": tokenizer}
    mlp, plain = {"reparam": "mlp"}, {"reparam": "mlp", "reparam_residual": False}
    return {
        "random1": {"num_virtual_tokens": 1},
        "vocab7": {"num_virtual_tokens": 7, "init": "vocab", "prefix_dropout": 0.1},
        "tokens32": {"num_virtual_tokens": 32, "init": "tokens", "init_token_ids": list(range(3, 30))},
        "text33": {"num_virtual_tokens": 33, "init": "text", "init_text": words, "layers_to_train": [0, 2], **text},
        "exemplars130": {"num_virtual_tokens": 130, "init": "exemplars", "init_exemplars": [words] * 2, **text},
        "mlp1": {"num_virtual_tokens": 1, **mlp},
        "kv7": {"num_virtual_tokens": 7, "num_frozen_tokens": 1, "init": "kv", "init_kv": cache, **plain},
        "adapter32": {
            "num_virtual_tokens": 32,
            "num_frozen_tokens": 1,
            "init": "adapter",
            "init_adapter": folder / "text33",
            "init_adapter_part": "keys",
            "reparam_shared_trunk": False,
            **mlp,
        },
        "average33": {
            "num_virtual_tokens": 33,
            "num_frozen_tokens": 2,
            "init": "average",
            "init_adapter": [folder / "text33", folder / "exemplars130"],
            "reparam_joint_kv": False,
            **plain,
        },
        "mlp130": {"num_virtual_tokens": 130, "num_frozen_tokens": 1, "layers_to_train": [1, 2], **mlp},
    }


class Line:
    """One base model with its adapters, in training and in an engine."""

    def __init__(self, architecture: str, folder: Path, tokenizer: str) -> None:
        def base() -> PreTrainedModel:
            return tiny_model(architecture, **ARCHITECTURES[architecture])

        base().save_pretrained(folder / "base")
        self.adapters: dict[str, str] = {}
        for seed, (name, config) in enumerate(prefixes(base(), folder, tokenizer).items(), start=1):
            model = with_prefix(base(), seed=seed, **config)
            perturb(model)
            self.adapters[name] = str(folder / name)
            model.save_pretrained(self.adapters[name])
        self.peft: PeftModel | None = None
        for name, path in self.adapters.items():
            if self.peft is None:
                self.peft = PeftModel.from_pretrained(base(), path, adapter_name=name)
            else:
                self.peft.load_adapter(path, adapter_name=name)
        # Adapters that stock PEFT trained are served as they are.
        self.stock: dict[str | None, PeftModel] = {}
        torch.manual_seed(1)
        for name, config in STOCK.items():
            # PEFT writes into a config what it finds in the model.
            self.stock[name] = get_peft_model(base(), copy.copy(config)).eval()
            perturb(self.stock[name])
            self.adapters[name] = str(folder / name)
            self.stock[name].save_pretrained(self.adapters[name])
        self.requests = [
            (name, random_ids(length, seed=length + number).tolist())
            for number, name in enumerate([None, *self.adapters])
            for length in PROMPT_LENGTHS
        ]
        self.expected = [self.reference(name, prompt) for name, prompt in self.requests]
        self.llm = start(
            folder / "base",
            # Far fewer than the 39 requests need together, so that every pass preempts.
            num_gpu_blocks_override=40,
            disable_log_stats=False,
            **prefix_adapters(self.adapters),
        )

    @torch.no_grad()
    def reference(self, name: str | None, prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW_TOKENS, "do_sample": False}
        if name in self.stock:
            return self.stock[name].generate(input_ids=ids, **options)[0, len(prompt) :].tolist()
        if name is None:
            with self.peft.disable_adapter():
                return self.peft.generate(input_ids=ids, **options)[0, len(prompt) :].tolist()
        self.peft.set_adapter(name, inference_mode=True)
        return self.peft.generate(input_ids=ids, **options)[0, len(prompt) :].tolist()

    def serve(self, requests: list[tuple[str | None, list[int]]]) -> list[list[int]]:
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for _, prompt in requests],
            SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False),
            lora_request=[name and PrefixAdapterRequest(name) for name, _ in requests],
            use_tqdm=False,
        )
        assert [list(output.prompt_token_ids) for output in outputs] == [prompt for _, prompt in requests]
        return [list(output.outputs[0].token_ids) for output in outputs]

    def preemptions(self) -> int:
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == "vllm:num_preemptions")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def line(request, tmp_path_factory, word_tokenizer) -> Iterator[Line]:
    line = Line(request.param, tmp_path_factory.mktemp(request.param), word_tokenizer)
    yield line
    line.llm.llm_engine.engine_core.shutdown()
    del line.llm
    gc.collect()


def test_adapters_matter(line):
    """Guards the tests below: outputs depend on the adapter and on the prompt."""
    answers = {tuple(tokens) for tokens in line.expected}
    assert len(answers) == len(line.expected)
    varied = [tokens for tokens in line.expected if len(set(tokens)) > 3]
    assert len(varied) > 0.8 * len(line.expected)


def test_tokens_equal_peft_cold_warm_and_preempted(line):
    before = line.preemptions()
    assert line.serve(line.requests) == line.expected  # cold
    assert line.preemptions() > before
    assert line.serve(line.requests) == line.expected  # warm, in part
    backwards = line.requests[::-1]
    assert line.serve(backwards) == line.expected[::-1]


def test_tokens_equal_peft_one_by_one_and_after_reset(line):
    some = range(0, len(line.requests), 4)
    for index in some:
        assert line.serve([line.requests[index]]) == [line.expected[index]]
        assert line.serve([line.requests[index]]) == [line.expected[index]]  # all in the cache
    assert line.llm.reset_prefix_cache()
    for index in some:
        assert line.serve([line.requests[index]]) == [line.expected[index]]
