"""The blocks of a model in training: faster on a CPU, and with activations that the backward pass computes again.

`wrap_blocks` replaces each block by a `TrainedBlock`, which holds the same modules under the same names, so that
state-dict keys, adapters and parameter groups do not change.  On a CPU:

- float32 products use oneDNN, because torch's default library uses only half of the vector width of many CPUs;
- autocast keeps no converted copy of the weights, and LayerScale keeps no product for its gradient;
- attention keeps only its input, see `cpu_attention`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..backbone import Backbone
from ..model.attention import rope_attention, why_not_triton
from ..model.cpu.linear import why_not_packed
from ..model.fused import layer_norm, residual_norm
from ..model.layers import Block, LayerNorm, MaskedKeyLinear, Residual
from ..model.rope import RopeTable
from .cpu_attention import attend

__all__ = ["Linear", "Recompute", "linear", "wrap_blocks"]

Recompute = Literal["none", "cheap", "all"]
Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]  # forward pass, recomputation

_EMPTY = ContextVar("_EMPTY", default=False)  # `linear` skips its product


def wrap_blocks(backbone: Backbone, compiled: bool, recompute: Recompute) -> None:
    """Replaces the blocks of a backbone by blocks for training.

    Args:
        backbone: changed in place.
        compiled: compile the blocks with torch.compile, which chooses the activations to keep.
        recompute: activations that the backward pass computes again.  "cheap": the outputs of norms and of the MLP's
            activation function, a third of the activations of a block, in a hundredth of its time; "all": everything;
            "none": nothing.
    """
    for i, module in enumerate(backbone.blocks):
        block = cast(Block, module)
        layers = (block.attn.qkv, block.attn.proj, *block.mlp.children())
        ours = not compiled and all(isinstance(layer, nn.Linear) for layer in layers)  # not peft's layers
        backbone.blocks[i] = (FastBlock if ours else TrainedBlock)(block, compiled, recompute)


class TrainedBlock(Block):
    """A block with the modules of another one, compiled or computed again in the backward pass."""

    def __init__(self, block: Block, compiled: bool, recompute: Recompute) -> None:
        nn.Module.__init__(self)  # Block.__init__ would create new weights
        for name, part in block.named_children():
            self.add_module(name, part)
        self.training, self.compiled, self.recompute = block.training, compiled, recompute

    def forward(self, *args: Any) -> Tensor:
        """Tokens [B, N, C], or packed [T, C], to tokens of the same shape; arguments as those of `Block.forward`."""
        return self._run(Block.forward, *args)

    def forward_dropped(self, *args: Any) -> Tensor:
        """Packed tokens [T, C] to [T, C], with stochastic depth; arguments as those of `Block.forward_dropped`."""
        return self._run(Block.forward_dropped, *args)

    def _run(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        function = _compiled(function) if self.compiled else function
        if self.recompute == "all":
            return _recomputed(function, self, *args, contexts=_drawing_the_same)
        return function(self, *args)


class FastBlock(TrainedBlock):
    """A block that computes with `linear` and `attend`, and on a GPU with the norms of `model.fused`."""

    def forward(self, x: Tensor, *where: Any) -> Tensor:
        if self.recompute == "none" and _kernel_dtype(x, self.norm2) is not None:
            return self._fused(x, *where)
        return super().forward(x, *where)

    def attention_branch(
        self,
        x: Tensor,  # [B, N, C] or packed [T, C]
        rope: RopeTable | None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """The attention branch of the block, without its residual, in the shape of x."""
        return _apply(self.attn.proj, self._attended(x, rope, cu_seqlens, max_seqlen), self.ls1).to(x.dtype)

    def mlp_branch(self, x: Tensor) -> Tensor:
        """The MLP branch of the block, without its residual: [..., C] to [..., C]."""
        expand = next(self.mlp.children())
        hidden = self._cheaply(lambda x: _apply(cast(nn.Linear, expand), _normed(self.norm2, x)), x)
        return self._contracted(hidden).to(x.dtype)

    def _fused(self, x: Tensor, *where: Any) -> Tensor:
        """As `Block.forward`; the first branch is added by the kernel that norms the sum."""
        dtype = _kernel_dtype(x, self.norm2)
        assert dtype is not None
        branch, norm = _apply(self.attn.proj, self._attended(x, *where)), self.norm2
        x, h = residual_norm(x, branch, self.ls1.gamma, norm.weight, norm.bias, norm.eps, dtype)
        return x + self._contracted(_apply(cast(nn.Linear, next(self.mlp.children())), h)).to(x.dtype)

    def _attended(
        self, x: Tensor, rope: RopeTable | None, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
    ) -> Tensor:
        attn = self.attn
        cos, sin = rope if rope is not None else (None, None)
        qkv = self._cheaply(lambda x: _apply(attn.qkv, _normed(self.norm1, x)), x)
        function = attend if attn.attend is rope_attention else attn.attend
        heads = qkv.unflatten(-1, (3, attn.num_heads, -1))
        return function(heads, cos, sin, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)

    def _contracted(self, hidden: Tensor) -> Tensor:
        *_, contract = self.mlp.children()
        return self._cheaply(
            lambda hidden: _apply(cast(nn.Linear, contract), self.mlp.activate(hidden), self.ls2), hidden
        )

    def _cheaply(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """function(x); keeps only x for the backward pass if recompute is "cheap"."""
        return _recomputed(function, x, contexts=_without_values) if self.recompute == "cheap" else function(x)


def _kernel_dtype(x: Tensor, norm: nn.Module) -> torch.dtype | None:
    """The dtype of the products after a norm, where one kernel can norm x and round it; None elsewhere."""
    kind = x.device.type
    if kind not in ("cuda", "xpu") or x.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
        return None
    dtype, plain = torch.get_autocast_dtype(kind), type(norm.weight) in (Tensor, nn.Parameter)
    return dtype if plain and why_not_triton(x.device, dtype, 64) is None else None


def _normed(norm: LayerNorm, x: Tensor) -> Tensor:
    dtype = _kernel_dtype(x, norm)
    if dtype is None:
        return norm(x)  # type: ignore[no-any-return]
    return layer_norm(x, norm.weight, norm.bias, norm.eps, dtype)


def _apply(layer: nn.Linear, x: Tensor, residual: Residual | None = None) -> Tensor:
    """A linear layer and its LayerScale in one, so that the product is not kept for the gradient of LayerScale."""
    bias = layer.masked_bias if isinstance(layer, MaskedKeyLinear) else layer.bias
    return linear(x, layer.weight, bias, None if residual is None else residual.gamma)


# --- computed twice ----------------------------------------------------------------------------------------------


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function)


def _recomputed(function: Callable[..., Tensor], *args: Any, contexts: Callable[..., Contexts]) -> Tensor:
    """function(*args), keeping only the arguments for the backward pass.

    The recomputation stops after the last tensor that the backward pass needs.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    found: Tensor = checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: contexts(*args)
    )
    return found


def _without_values(*_: Any) -> Contexts:
    """Contexts in which the recomputation skips the product of `linear`, whose backward pass needs its inputs only."""

    @contextmanager
    def again() -> Iterator[None]:
        before = _EMPTY.set(True)
        try:
            yield
        finally:
            _EMPTY.reset(before)

    return nullcontext(), again()


def _drawing_the_same(*args: Any) -> Contexts:
    """Contexts that restore a generator among the arguments, since torch restores only its global generators."""
    drawn = next((arg for arg in args if isinstance(arg, torch.Generator)), None)
    if drawn is None:
        return nullcontext(), nullcontext()
    state = drawn.get_state()

    @contextmanager
    def again() -> Iterator[None]:
        drawn.set_state(state)
        yield

    return nullcontext(), again()


# --- linear layers -----------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gamma: Tensor | None = None) -> Tensor:
    """(x W^T + b) * gamma, with oneDNN on a CPU.

    Args:
        x: [..., K].
        weight: W, [C, K].
        bias: b, [C].
        gamma: factors of LayerScale, [C].

    Returns:
        [..., C].
    """
    plain = type(weight) in (Tensor, nn.Parameter) and x.numel() > 0
    if not plain or x.device.type != "cpu":
        product = F.linear(x, weight, bias)
        return product if gamma is None else product * gamma
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    return _Linear.apply(x, weight, bias, gamma)  # type: ignore[no-any-return,no-untyped-call]


class Linear(nn.Linear):
    """`nn.Linear` with oneDNN on a CPU, see `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., C]."""
        return linear(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias, gamma)
        dtype = x.dtype if gamma is None else torch.promote_types(x.dtype, gamma.dtype)
        if _EMPTY.get():
            return x.new_empty(*x.shape[:-1], len(weight), dtype=dtype)
        product = _product(x, weight, bias)
        return product if gamma is None else product.mul_(gamma) if product.dtype == dtype else product * gamma

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """One product without gamma gives both gradients: times gamma it is dW, times W and summed it is dgamma."""
        x, weight, bias, gamma = ctx.saved_tensors
        needs, scaled = ctx.needs_input_grad, weight if gamma is None else weight * gamma[:, None]
        rows = gradient.flatten(0, -2)
        total = rows.sum(0, dtype=weight.dtype) if any(needs[2:]) else None
        rows = rows.to(x.dtype)
        dx = _product(rows, scaled.T).view_as(x) if needs[0] else None
        dw = _product(rows.T, x.flatten(0, -2).T).to(weight.dtype) if needs[1] or needs[3] else None
        if gamma is None:
            return dx, dw, total, None
        dgamma = None
        if needs[3]:
            dgamma = (dw * weight).sum(1) if bias is None else (dw * weight).sum(1) + total * bias
        return dx, dw * gamma[:, None] if needs[1] else None, total * gamma if needs[2] else None, dgamma


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in the dtype of x."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if x.dtype != torch.float32 or why_not_packed() is not None:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
