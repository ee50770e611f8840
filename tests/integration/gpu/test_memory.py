"""Memory of a GPU: the KV cache leaves room for prefixes, and a sleeping engine keeps none on its device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.scripts import ROOT
from helpers.serving import support

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

GIB = 2**30
# An engine in a process of its own: it says how large its cache is and how many prefixes it holds.
SCRIPT = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm_plugin import PrefixAdapterRequest, prefix_adapters

model, adapter, memory, out = sys.argv[1:]
llm = LLM(model=model, dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_model_len=512,
          gpu_memory_utilization=0.3, enable_sleep_mode=True,
          **prefix_adapters({"one": adapter}, prefix_adapter_device_memory=float(memory)))
caches = {}
for module in llm.llm_engine.vllm_config.compilation_config.static_forward_context.values():
    storage = module.kv_cache.untyped_storage()
    caches[storage.data_ptr()] = storage.nbytes()

def ask():
    (output,) = llm.generate([{"prompt_token_ids": [5, 6, 7]}], SamplingParams(max_tokens=8, temperature=0, detokenize=False),
                             lora_request=[PrefixAdapterRequest("one")], use_tqdm=False)
    return list(output.outputs[0].token_ids)

def resident():
    return get_kv_transfer_group().writer._manager.num_resident

found = {"cache": sum(caches.values()), "answers": [ask()], "resident": [resident()]}
llm.sleep(1)
found["resident"].append(resident())
llm.wake_up()
found["answers"].append(ask())
found["resident"].append(resident())
open(out, "w").write(json.dumps(found))
"""


def run(folder: Path, memory: float) -> dict[str, list[int]]:
    out = folder / f"{memory}.json"
    command = [sys.executable, "-c", SCRIPT, str(folder / "model"), str(folder / "one"), str(memory), str(out)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True)
    assert out.exists(), done.stdout[-3000:] + done.stderr[-6000:]
    return dict(json.loads(out.read_text(encoding="utf-8")))


def test_memory_for_prefixes(tmp_path: Path) -> None:
    config = support.llama_config()
    support.write_model(tmp_path / "model", config)
    support.write_adapter(tmp_path / "one", config, support.random_prefix(config, 40))
    large, small = run(tmp_path, 2.0), run(tmp_path, 0.0)
    assert small["cache"] - large["cache"] == pytest.approx(2 * GIB, rel=0.05)
    assert large["resident"] == [1, 0, 1]
    # One that does not fit is copied from the host each time.
    assert small["resident"] == [0, 0, 0]
    assert large["answers"][0] == large["answers"][1] == small["answers"][0] == small["answers"][1]
