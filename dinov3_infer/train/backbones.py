"""What training does to a backbone: low-rank adapters, compiled blocks, activations computed twice."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from ..backbone import Backbone
from .distributed import whole

__all__ = ["add_adapters", "plain_copy", "wrap_blocks"]


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


def wrap_blocks(backbone: Backbone, compiled: bool, recomputed: bool) -> None:
    """Every block compiled; or one that keeps its input alone and runs again in the backward pass."""
    for block in backbone.blocks:
        for name in ("forward", "forward_dropped"):
            function = getattr(block, name)
            function = torch.compile(function) if compiled else function
            setattr(block, name, _recomputed(function) if recomputed else function)


def _recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapped(*args: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return function(*args)
        drawn = next((arg for arg in args if isinstance(arg, torch.Generator)), None)
        found: Tensor = checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: _replay(drawn)
        )
        return found

    return wrapped


def _replay(drawn: torch.Generator | None) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the first and the second run: torch replays its own generators, but not one that is handed over."""
    states: list[Tensor] = []

    @contextmanager
    def first() -> Iterator[None]:
        if drawn is not None:
            states.append(drawn.get_state())
        yield

    @contextmanager
    def again() -> Iterator[None]:
        if drawn is None:
            yield
            return
        now = drawn.get_state()
        drawn.set_state(states[0])
        yield
        drawn.set_state(now)

    return first(), again()
