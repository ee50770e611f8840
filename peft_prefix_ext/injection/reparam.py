"""The reparameterization: an MLP that yields the K/V (Li & Liang 2021, section 4.3), or what is added to the initial ones."""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN

from peft_prefix_ext.base_model.layers import ProbedLayer
from peft_prefix_ext.checkpoint.format import LayerKV
from peft_prefix_ext.config import PrefixExtConfig


class PrefixMLP(nn.Module):
    """One trainable latent per virtual token, and trunks with a linear head for the K/V that share them.

    `start_at` sets the heads so that at step 0 the prefix is exactly what it was initialised to. There is no batch
    dimension; a forward pass of the model evaluates it once.

    Args:
        config: Width, depth, activation and dropout, and which K/V share a trunk.
        shapes: The K and V shapes of each layer, `[num_kv_heads, num_tokens, head_dim]` each.
    """

    def __init__(self, config: PrefixExtConfig, shapes: list[tuple[list[int], list[int]]]) -> None:
        super().__init__()
        self.is_residual = config.reparam_residual
        self.shapes = [shape for pair in shapes for shape in pair]
        self.num_tokens = self.shapes[0][1]
        self.latent = nn.Parameter(torch.randn(self.num_tokens, config.reparam_latent_size))
        groups: dict[tuple[int, int], list[int]] = {}
        for number in range(len(self.shapes)):
            layer, kind = divmod(number, 2)
            trunk = (0 if config.reparam_shared_trunk else layer, 0 if config.reparam_joint_kv else kind)
            groups.setdefault(trunk, []).append(number)
        self.groups = list(groups.values())
        self.trunks = nn.ModuleList(new_trunk(config) for _ in self.groups)
        self.heads = nn.ModuleList(
            nn.Linear(config.reparam_hidden_size, sum(self._width(number) for number in group)) for group in self.groups
        )

    def _width(self, number: int) -> int:
        heads, _, head_dim = self.shapes[number]
        return heads * head_dim

    def project(self) -> torch.Tensor:
        """Returns the K/V of all layers as one tensor, `[num_tokens, sum of num_kv_heads * head_dim]`."""
        said = [head(trunk(self.latent)) for trunk, head in zip(self.trunks, self.heads, strict=True)]
        return torch.cat(said, dim=-1)

    def split(self, projected: torch.Tensor) -> list[LayerKV]:
        """Returns what `project` gave, layer by layer, `[num_kv_heads, num_tokens, head_dim]` each."""
        order = [number for group in self.groups for number in group]
        parts = projected.split([self._width(number) for number in order], dim=-1)
        states = {}
        for number, part in zip(order, parts, strict=True):
            heads, _, head_dim = self.shapes[number]
            states[number] = part.view(self.num_tokens, heads, head_dim).transpose(0, 1)
        return [LayerKV(states[number], states[number + 1]) for number in range(0, len(states), 2)]

    def forward(self, is_split: bool = True) -> list[LayerKV] | torch.Tensor:
        """Returns what `project` does, by a call: where parameters are sharded, only then a module has its own."""
        projected = self.project()
        return self.split(projected) if is_split else projected

    def evaluate(self, config: PrefixExtConfig, parameters: dict[str, torch.Tensor]) -> list[LayerKV]:
        """Returns what `forward` would be with these parameters, without dropout, and without what hooks do to its own."""
        with torch.device("meta"):
            form = PrefixMLP(config, list(zip(self.shapes[::2], self.shapes[1::2], strict=True))).eval()
        return torch.func.functional_call(form, parameters, ())

    @torch.no_grad()
    def start_at(self, initial: list[LayerKV]) -> None:
        """Sets the heads so that the K/V are `initial`, `[num_kv_heads, num_tokens, head_dim]` each.

        To zero where the MLP is added to them; else by least squares on what the trunks say of the latents, of all exact
        solutions the one with the smallest weights.

        Raises:
            ValueError: If the trunks say too little for that.
        """
        if self.is_residual:
            for parameter in self.heads.parameters():
                parameter.zero_()
            return
        states = [state.transpose(0, 1).flatten(1) for kv in initial for state in kv]
        was_training = self.training
        self.eval()
        for trunk, head, group in zip(self.trunks, self.heads, self.groups, strict=True):
            said = trunk(self.latent).double().cpu()
            said = torch.cat([said, torch.ones_like(said[:, :1])], dim=-1)
            wanted = torch.cat([states[number] for number in group], dim=-1).double().cpu()
            # What is below the rounding of float32 is noise, and would ask for weights of any size.
            found = torch.linalg.lstsq(said, wanted, rcond=1e-6, driver="gelsd").solution
            weight, bias = head.parameters()
            weight.copy_(found[:-1].T)
            bias.copy_(found[-1])
            tolerance = 1e-4 if weight.dtype.itemsize >= 4 else 5e-2
            if (head(trunk(self.latent)).double().cpu() - wanted).abs().max() > tolerance * wanted.abs().max():
                raise ValueError(
                    f"The MLP cannot yield the {self.num_tokens} tokens that the prefix starts as: with "
                    f"`reparam_residual=False`, `reparam_hidden_size` must be well above {self.num_tokens}, and "
                    "`reparam_activation` not linear; or use `reparam_residual=True`."
                )
        self.train(was_training)


def new_trunk(config: PrefixExtConfig) -> nn.Sequential:
    modules: list[nn.Module] = []
    width = config.reparam_latent_size
    for _ in range(config.reparam_num_layers):
        modules += [nn.Linear(width, config.reparam_hidden_size), ACT2FN[config.reparam_activation]]
        modules += [nn.Dropout(config.reparam_dropout)]
        width = config.reparam_hidden_size
    return nn.Sequential(*modules)


def new_reparam(config: PrefixExtConfig, layers: list[ProbedLayer], initial: list[LayerKV]) -> PrefixMLP | None:
    """Returns the reparameterization of an adapter that starts at `initial`, the K/V of `layers`; `None` without one."""
    if config.reparam == "none" or config.inference_mode or not any(config.trains(layer.index) for layer in layers):
        return None
    num_frozen = config.num_frozen_tokens
    trained = [(layer, kv) for layer, kv in zip(layers, initial, strict=True) if config.trains(layer.index)]
    key = initial[0].key
    mlp = PrefixMLP(config, [layer.shapes(config.num_virtual_tokens - num_frozen) for layer, _ in trained])
    if mlp.latent.device.type != "meta":  # as under `low_cpu_mem_usage`, when PEFT moves it once it is loaded
        mlp = mlp.to(key.device, key.dtype)
    if config.is_saved:
        for parameter in mlp.parameters():
            nn.init.constant_(parameter, float("nan"))  # until it is loaded, as the K/V are
    else:
        mlp.start_at([LayerKV(*(state[:, num_frozen:] for state in kv)) for _, kv in trained])
    return mlp
