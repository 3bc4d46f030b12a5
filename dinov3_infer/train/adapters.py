"""Low-rank adapters on a backbone, and the plain model that they come to."""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..backbone import Backbone
from .distributed import whole

__all__ = ["add_adapters", "plain_copy"]


class LowRank(nn.Module):
    """W + up @ down, which starts as W.  Source: LoRA (arXiv 2106.09685), with its alpha equal to the rank."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        self.down = nn.Parameter(torch.empty(rank, in_features, dtype=weight.dtype))
        self.up = nn.Parameter(torch.zeros(out_features, rank, dtype=weight.dtype))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def add_adapters(backbone: Backbone, rank: int) -> None:
    """Freezes the backbone and puts an adapter on every linear layer of its blocks."""
    backbone.requires_grad_(False)
    for module in list(backbone.blocks.modules()):
        if isinstance(module, nn.Linear):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))


def plain_copy(backbone: Backbone) -> Backbone:
    """The same model on the CPU, adapters merged, nothing spread over processes; all processes call it."""
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
