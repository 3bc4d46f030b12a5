"""What training does to a backbone: low-rank adapters, compiled blocks, activations computed twice."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..backbone import Backbone
from .distributed import whole

__all__ = ["Recompute", "add_adapters", "plain_copy", "wrap_blocks"]

Recompute = Literal["none", "cheap", "all"]

# What "cheap" keeps the results of; norms, activations, rotations, copies and the like are computed again.
_COSTLY = {
    "aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention", "dinov3_infer::rope_attention",
}  # fmt: skip


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


def wrap_blocks(backbone: Backbone, compiled: bool, recompute: Recompute) -> None:
    """Blocks that are compiled, or that compute some of their activations again in the backward pass."""
    if compiled and recompute == "cheap":
        recompute = "none"  # the compiler chooses by itself what to keep
    for block in backbone.blocks:
        for name in ("forward", "forward_dropped"):
            function = getattr(block, name)
            function = torch.compile(function) if compiled else function
            setattr(block, name, function if recompute == "none" else _recomputed(function, recompute == "cheap"))


def _recomputed(function: Callable[..., Tensor], cheap: bool) -> Callable[..., Tensor]:
    def wrapped(*args: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return function(*args)
        drawn = next((arg for arg in args if isinstance(arg, torch.Generator)), None)
        found: Tensor = checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: _contexts(drawn, cheap)
        )
        return found

    return wrapped


def _contexts(
    drawn: torch.Generator | None, cheap: bool
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of the first and the second run, which draw the same: torch replays its own generators, but not a given one."""
    keeping = create_selective_checkpoint_contexts(_policy) if cheap else (nullcontext(), nullcontext())
    states: list[Tensor] = []

    @contextmanager
    def first() -> Iterator[None]:
        if drawn is not None:
            states.append(drawn.get_state())
        with keeping[0]:
            yield

    @contextmanager
    def again() -> Iterator[None]:
        if drawn is not None:
            drawn.set_state(states[0])
        with keeping[1]:
            yield

    return first(), again()


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name().partition(".")[0]
    return CheckpointPolicy.MUST_SAVE if name in _COSTLY else CheckpointPolicy.PREFER_RECOMPUTE
