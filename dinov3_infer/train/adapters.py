"""Low-rank adapters on a backbone, and their merging into a plain model."""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..backbone import Backbone
from .distributed import whole

__all__ = ["add_adapters", "plain_copy"]


class LowRank(nn.Module):
    """Adapts a weight W as W + up @ down, which starts at W.  Source: LoRA (arXiv 2106.09685), alpha = rank."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        self.down = nn.Parameter(torch.empty(rank, in_features, dtype=weight.dtype))
        self.up = nn.Parameter(torch.zeros(out_features, rank, dtype=weight.dtype))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight, [out, in], of a weight [out, in]."""
        return weight + self.up @ self.down


def add_adapters(backbone: Backbone, rank: int) -> None:
    """Freezes the backbone and adds an adapter of this rank to every linear layer of its blocks."""
    backbone.requires_grad_(False)
    for module in list(backbone.blocks.modules()):
        if isinstance(module, nn.Linear):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))


def plain_copy(backbone: Backbone) -> Backbone:
    """A copy of the model on the CPU, with adapters merged and unsharded parameters; all processes must call it."""
    state = {name: whole(tensor).detach().cpu() for name, tensor in backbone.state_dict().items()}
    made = Backbone(backbone.config, backbone.info).eval()
    ranks = [len(tensor) for name, tensor in state.items() if name.endswith(".down")]
    if ranks:
        add_adapters(made, ranks[0])
    made.load_state_dict(state)
    for module in list(made.modules()) if ranks else ():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    made.requires_grad_(True)
    made.preprocess = copy.copy(backbone.preprocess)
    return made
