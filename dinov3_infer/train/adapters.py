"""What training does to a backbone: low-rank adapters, compiled blocks, activations computed twice."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from ..backbone import Backbone
from ..model.attention import rope_attention
from ..model.layers import Block
from .attending import attend
from .distributed import whole
from .products import scale_within, speed_up, without_values

__all__ = ["Recompute", "add_adapters", "plain_copy", "wrap_blocks"]

Recompute = Literal["none", "cheap", "all"]


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
    """Blocks whose products and attention are fast and keep little, that are compiled, or that compute some of their
    activations again in the backward pass.

    "cheap": what norms and the activation of the MLP make, a third of what a block keeps, for a hundredth of its time.
    """
    for module in backbone.blocks:
        block = cast(Block, module)
        if not compiled:
            speed_up(block)
            for residual, branch in ((block.ls1, block.attn), (block.ls2, block.mlp)):
                *_, last = (part for part in branch.children() if isinstance(part, nn.Linear))
                scale_within(last, residual)
            if block.attn.attend is rope_attention:
                block.attn.attend = attend
        if recompute == "cheap" and not compiled:  # the compiler chooses by itself what to keep
            first, _ = block.mlp.children()
            _made_again(block.norm1, block.attn.qkv)
            _made_again(block.norm2, first)
            block.mlp.contract = _recomputed(block.mlp.contract, _values_unused)  # type: ignore[method-assign]
        for name in ("forward", "forward_dropped"):
            function = getattr(block, name)
            function = torch.compile(function) if compiled else function
            setattr(block, name, _recomputed(function) if recompute == "all" else function)


def _made_again(norm: nn.Module, linear: nn.Module) -> None:
    """The linear gets the input of the norm before it, which alone is kept."""
    normed, projected = norm.forward, linear.forward
    norm.forward = lambda x: x
    linear.forward = _recomputed(lambda x: projected(normed(x)), _values_unused)


Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]  # of the first and the second run


def _recomputed(
    function: Callable[..., Tensor], contexts: Callable[..., Contexts] | None = None
) -> Callable[..., Tensor]:
    """Keeps the arguments alone.  The second run ends with the last tensor that is needed: no product is made twice
    that nothing follows.
    """
    contexts = contexts or _drawing_the_same

    def wrapped(*args: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return function(*args)
        found: Tensor = checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: contexts(*args)
        )
        return found

    return wrapped


def _values_unused(*_: Any) -> Contexts:
    return nullcontext(), without_values()


def _drawing_the_same(*args: Any) -> Contexts:
    """torch replays its own generators, but not a given one."""
    drawn = next((arg for arg in args if isinstance(arg, torch.Generator)), None)
    states: list[Tensor] = []

    @contextmanager
    def first() -> Iterator[None]:
        if drawn is not None:
            states.append(drawn.get_state())
        yield

    @contextmanager
    def again() -> Iterator[None]:
        if drawn is not None:
            drawn.set_state(states[0])
        yield

    return first(), again()
