"""Models with a prefix, for tests."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import DynamicCache, PreTrainedModel

from helpers.tiny import tiny_model
from peft_prefix_ext import PrefixExtConfig
from peft_prefix_ext.base_model.cache_argument import cache_argument
from peft_prefix_ext.injection.layer import PrefixExtLayer
from peft_prefix_ext.injection.state_layer import PrefixStateLayer


def with_prefix(
    model: PreTrainedModel | PeftModel, seed: int = 1, adapter_name: str = "default", **config: object
) -> PeftModel:
    """Gives `model` a prefix that is large enough to change its output, flat by default."""
    torch.manual_seed(seed)
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 7, "reparam": "none", **config}
    if settings.get("init", "random") == "random":
        settings.setdefault("init_std", 1.0)
    return get_peft_model(model, PrefixExtConfig(**settings), adapter_name).eval()


def perturb(model: torch.nn.Module, std: float = 0.3) -> None:
    """Moves every trainable parameter, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn_like(parameter))


def trained_model(name: str = "llama", **config: object) -> PeftModel:
    """Returns a tiny model with a prefix that was moved from its start, with two frozen tokens."""
    model = with_prefix(tiny_model(name), num_frozen_tokens=2, **config)
    perturb(model)
    return model


# Ways to parameterize a prefix that every initialisation must be exact under.
REPARAMS: dict[str, dict] = {
    "flat": {},
    "residual": {"reparam": "mlp"},
    "plain": {"reparam": "mlp", "reparam_residual": False},
}


def prefix_kv(model: torch.nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """Returns the K/V of an adapter as they are saved, by name, `[num_kv_heads, num_virtual_tokens, head_dim]` each."""
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {name: kv for name, kv in state.items() if name.endswith(("prefix_ext_key", "prefix_ext_value"))}


@torch.no_grad()
def prefix_layers(model: torch.nn.Module) -> list[PrefixExtLayer]:
    """The layers of a model with a prefix, in order of their index."""
    layers = [module for module in model.modules() if isinstance(module, PrefixExtLayer)]
    return sorted(layers, key=lambda layer: layer.index)


def state_layers(model: torch.nn.Module) -> list[PrefixStateLayer]:
    """The recurrent layers of a model with a prefix, in order of their index."""
    layers = [module for module in model.modules() if isinstance(module, PrefixStateLayer)]
    return sorted(layers, key=lambda layer: layer.index)


@torch.no_grad()
def with_prefix_of(model: PreTrainedModel, token_ids: list[int], **config: object) -> PeftModel:
    """Gives `model` the prefix that its own cache says `token_ids` are."""
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([token_ids]), use_cache=True, **{cache_argument(model) or "past_key_values": cache})
    prefixed = with_prefix(model, num_virtual_tokens=len(token_ids), **config)
    for layer in prefix_layers(prefixed):
        layer.prefix_ext_key["default"].copy_(cache.layers[layer.index].keys[0])
        layer.prefix_ext_value["default"].copy_(cache.layers[layer.index].values[0])
    for layer in state_layers(prefixed):
        for kind, number in layer.states:
            state = getattr(cache.layers[layer.index], f"{kind}_states")[number][0]
            layer.state(kind, number)["default"].copy_(state[:, 1:] if kind == "conv" else state)
    return prefixed
