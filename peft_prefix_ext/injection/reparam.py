"""The reparameterization: an MLP whose output is the K/V (Li & Liang 2021, section 4.3), or is added to the initial K/V."""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN

from peft_prefix_ext.base_model.layers import ProbedLayer
from peft_prefix_ext.checkpoint.format import LayerKV
from peft_prefix_ext.config import PrefixExtConfig


class PrefixMLP(nn.Module):
    """A trainable latent per virtual token, trunks of hidden layers, and a linear head on each trunk for its K/V.

    `start_at` sets the heads so that at step 0 the prefix equals its initial K/V. There is no batch dimension: a forward
    pass of the model evaluates the MLP once.

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
        self.trunks = nn.ModuleList(build_trunk(config) for _ in self.groups)
        self.heads = nn.ModuleList(
            nn.Linear(config.reparam_hidden_size, sum(self._width(number) for number in group)) for group in self.groups
        )

    def _width(self, number: int) -> int:
        heads, _, head_dim = self.shapes[number]
        return heads * head_dim

    def project(self) -> torch.Tensor:
        """Returns the K/V of all layers in one tensor, `[num_tokens, sum of num_kv_heads * head_dim]`."""
        outputs = [head(trunk(self.latent)) for trunk, head in zip(self.trunks, self.heads, strict=True)]
        return torch.cat(outputs, dim=-1)

    def split(self, projected: torch.Tensor) -> list[LayerKV]:
        """Returns the output of `project` layer by layer, `[num_kv_heads, num_tokens, head_dim]` each."""
        order = [number for group in self.groups for number in group]
        parts = projected.split([self._width(number) for number in order], dim=-1)
        tensors = {}
        for number, part in zip(order, parts, strict=True):
            heads, _, head_dim = self.shapes[number]
            tensors[number] = part.view(self.num_tokens, heads, head_dim).transpose(0, 1)
        return [LayerKV(tensors[number], tensors[number + 1]) for number in range(0, len(tensors), 2)]

    def forward(self, is_split: bool = True) -> list[LayerKV] | torch.Tensor:
        """Returns the K/V, split or as `project` returns them.

        Sharded parameters (FSDP, ZeRO-3) are gathered for a call of the module, but not for its other methods.
        """
        projected = self.project()
        return self.split(projected) if is_split else projected

    def evaluate(self, config: PrefixExtConfig, parameters: dict[str, torch.Tensor]) -> list[LayerKV]:
        """Returns the output of `forward` with these parameters, without dropout and without hooks."""
        with torch.device("meta"):
            skeleton = PrefixMLP(config, list(zip(self.shapes[::2], self.shapes[1::2], strict=True))).eval()
        return torch.func.functional_call(skeleton, parameters, ())

    @torch.no_grad()
    def start_at(self, initial: list[LayerKV]) -> None:
        """Sets the heads so that the K/V are `initial`, `[num_kv_heads, num_tokens, head_dim]` each.

        If the output is added to the initial K/V, the heads become zero. Otherwise they are the least-squares solution
        from the trunks' outputs to the K/V, that of the smallest norm if several are exact.

        Raises:
            ValueError: If no heads give these K/V.
        """
        if self.is_residual:
            for parameter in self.heads.parameters():
                parameter.zero_()
            return
        flat = [tensor.transpose(0, 1).flatten(1) for kv in initial for tensor in kv]
        was_training = self.training
        self.eval()
        for trunk, head, group in zip(self.trunks, self.heads, self.groups, strict=True):
            hidden = trunk(self.latent).double().cpu()
            hidden = torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=-1)
            target = torch.cat([flat[number] for number in group], dim=-1).double().cpu()
            # Singular values below float32's rounding are noise, and would lead to huge weights.
            solution = torch.linalg.lstsq(hidden, target, rcond=1e-6, driver="gelsd").solution
            weight, bias = head.parameters()
            weight.copy_(solution[:-1].T)
            bias.copy_(solution[-1])
            tolerance = 1e-4 if weight.dtype.itemsize >= 4 else 5e-2
            if (head(trunk(self.latent)).double().cpu() - target).abs().max() > tolerance * target.abs().max():
                raise ValueError(
                    f"The MLP cannot output the {self.num_tokens} tokens that the prefix starts at: with "
                    f"`reparam_residual=False`, `reparam_hidden_size` must be well above {self.num_tokens}, and "
                    "`reparam_activation` not linear; or use `reparam_residual=True`."
                )
        self.train(was_training)


def build_trunk(config: PrefixExtConfig) -> nn.Sequential:
    """Returns the hidden layers of an MLP."""
    modules: list[nn.Module] = []
    width = config.reparam_latent_size
    for _ in range(config.reparam_num_layers):
        modules += [nn.Linear(width, config.reparam_hidden_size), ACT2FN[config.reparam_activation]]
        modules += [nn.Dropout(config.reparam_dropout)]
        width = config.reparam_hidden_size
    return nn.Sequential(*modules)


def create_reparam(config: PrefixExtConfig, layers: list[ProbedLayer], initial: list[LayerKV]) -> PrefixMLP | None:
    """Returns the reparameterization of a new adapter; `None` if it has none.

    Args:
        config: The config of the adapter.
        layers: The attention layers with a prefix.
        initial: The initial K/V of each layer, `[num_kv_heads, num_virtual_tokens, head_dim]` each.
    """
    if config.reparam == "none" or config.inference_mode or not any(config.trains(layer.index) for layer in layers):
        return None
    num_frozen = config.num_frozen_tokens
    trained = [(layer, kv) for layer, kv in zip(layers, initial, strict=True) if config.trains(layer.index)]
    key = initial[0].key
    mlp = PrefixMLP(config, [layer.shapes(config.num_virtual_tokens - num_frozen) for layer, _ in trained])
    if mlp.latent.device.type != "meta":  # under `low_cpu_mem_usage` PEFT moves it once it is loaded
        mlp = mlp.to(key.device, key.dtype)
    if config.is_saved:
        for parameter in mlp.parameters():
            nn.init.constant_(parameter, float("nan"))  # until the weights are loaded, as for the K/V
    else:
        mlp.start_at([LayerKV(*(tensor[:, num_frozen:] for tensor in kv)) for _, kv in trained])
    return mlp
