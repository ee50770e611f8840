"""In model runner V2, custom logits processors see real prompts, without the placeholders of prefixes.

There they read tokens and lengths from the runner's own buffers, one row per request, whenever they like. So they get
buffers of their own, which hold the same without placeholders and follow the runner's in each step.

Shape suffixes: R requests in the batch, N new requests, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any

import torch
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor

from vllm_plugin.worker.device_copy import to_device
from vllm_plugin.worker.logits_processors import num_placeholders

# vLLM loads the logits processors of all installed packages, whatever its options are.
_GROUP = "vllm.logits_processors"


def build(make: Callable[..., list[Any]], vllm_config: Any, req_states: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """Creates the custom logits processors of an engine with prefixes.

    Args:
        make: vLLM's own function.
        vllm_config: The engine's config.
        req_states: vLLM's `RequestState`, the buffers of the runner.
        args: Further arguments of vLLM's function.
        kwargs: Further arguments of vLLM's function.
    """
    if not (vllm_config.model_config.logits_processors or entry_points(group=_GROUP)):
        return make(vllm_config, req_states, *args, **kwargs)
    shown = ShownRequests(req_states)
    processors = make(vllm_config, shown, *args, **kwargs)
    if not processors:
        return []
    speculative = vllm_config.speculative_config
    return [RealPrompts(shown, processors, 1 + (0 if speculative is None else speculative.num_speculative_tokens))]


class ShownRequests:
    """The buffers of vLLM's `RequestState` that logits processors read, without placeholders.

    Args:
        runner: vLLM's `RequestState`.
    """

    def __init__(self, runner: Any) -> None:
        from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor, UvaBackedTensor

        self.device, self.max_num_reqs, self.vocab_size = runner.device, runner.max_num_reqs, runner.vocab_size
        self._runner = runner
        shape = tuple(runner.all_token_ids.gpu.shape)
        # In host memory where the runner's are, since they take gigabytes with many long requests.
        uva = hasattr(runner.all_token_ids, "_uva_buf")
        self.all_token_ids = StagedWriteTensor(shape, torch.int32, self.device, uva_instead_of_gpu=uva)
        self.total_len = StagedWriteTensor(self.max_num_reqs, torch.int32, self.device)
        self.prompt_len = UvaBackedTensor(self.max_num_reqs, torch.int32)
        self.prefill_len = UvaBackedTensor(self.max_num_reqs, torch.int32)
        self.num_placeholders = UvaBackedTensor(self.max_num_reqs, torch.int32)

    def add(self, slots: Sequence[int]) -> None:
        """Copies new requests, whose `num_placeholders` are set."""
        for ours, theirs in ((self.prompt_len, self._runner.prompt_len), (self.prefill_len, self._runner.prefill_len)):
            ours.np[slots] = theirs.np[slots] - self.num_placeholders.np[slots]
            ours.copy_to_uva()
        self.num_placeholders.copy_to_uva()
        slots_N = to_device(torch.tensor(slots), self.device)
        self._copy(slots_N, torch.arange(int(self.prefill_len.np[slots].max()), device=self.device)[None])

    def update(self, slots_R: torch.Tensor, num_new: int) -> None:
        """Copies the last `num_new` tokens of requests in the batch, and how long they are."""
        slots_R = slots_R.long()
        total_R = self._runner.total_len.gpu[slots_R] - self.num_placeholders.gpu[slots_R]
        tokens_RT = total_R[:, None] - 1 - torch.arange(num_new, device=self.device)
        self._copy(slots_R, tokens_RT.clamp(min=0))

    def _copy(self, slots_R: torch.Tensor, tokens_RT: torch.Tensor) -> None:
        shift_R = self.num_placeholders.gpu[slots_R]
        self.total_len.gpu[slots_R] = self._runner.total_len.gpu[slots_R] - shift_R
        ours, theirs = self.all_token_ids.gpu, self._runner.all_token_ids.gpu
        rows_RT = slots_R[:, None].expand(-1, tokens_RT.shape[1])
        tokens_RT = tokens_RT.long().expand(len(slots_R), -1)
        # Rows of short requests are copied beyond their end, where nothing is read.
        sources_RT = (tokens_RT + shift_R[:, None]).clamp(max=theirs.shape[1] - 1)
        ours[rows_RT, tokens_RT] = theirs[rows_RT, sources_RT]


class RealPrompts(LogitsProcessor):
    """Runs the custom logits processors of an engine on buffers without placeholders.

    Args:
        shown: These buffers.
        processors: The processors, which were created with them.
        num_new: How many tokens a request gets in one step at most.
    """

    def __init__(self, shown: ShownRequests, processors: Sequence[Any], num_new: int) -> None:
        self._shown, self._processors, self._num_new = shown, processors, num_new
        self._new: list[int] = []

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        self._shown.num_placeholders.np[req_idx] = num_placeholders(sampling_params)
        self._new.append(req_idx)
        # All of them have to know the request.
        applied = [processor.add_request(req_idx, sampling_params) for processor in self._processors]
        return any(applied)

    def apply_staged_writes(self) -> None:
        if self._new:
            self._shown.add(self._new)
            self._new.clear()
        for processor in self._processors:
            processor.apply_staged_writes()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        shown = self._shown
        shown.update(ctx.idx_mapping, self._num_new)
        ctx = dataclasses.replace(
            ctx,
            pos=ctx.pos - shown.num_placeholders.gpu[ctx.expanded_idx_mapping.long()],
            seq_lens_upper_bound_np=ctx.seq_lens_upper_bound_np - shown.num_placeholders.np[ctx.idx_mapping_np],
        )
        for processor in self._processors:
            logits = processor.apply(logits, ctx)
        return logits
