"""Linear layers of a step on a CPU, forwards and backwards.

In float32 by oneDNN: torch hands these products to a library that on many CPUs uses half of their vectors.  Under
autocast no cast of the weights is kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.cpu.linear import why_not_packed
from ..model.layers import MaskedKeyLinear, Residual

__all__ = ["Linear", "linear", "scale_within", "speed_up", "without_values"]

_EMPTY = ContextVar("_EMPTY", default=False)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gamma: Tensor | None = None) -> Tensor:
    """(x W^T + b) * gamma: x [..., K], W [C, K], b and gamma [C]."""
    plain = type(weight) in (Tensor, nn.Parameter) and x.numel() > 0
    if not plain or x.device.type != "cpu":
        product = F.linear(x, weight, bias)
        return product if gamma is None else product * gamma
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    return _Linear.apply(x, weight, bias, gamma)  # type: ignore[no-any-return,no-untyped-call]


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def speed_up(module: nn.Module) -> None:
    """All its linear layers compute with `linear`."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.forward = _forward(part)  # type: ignore[method-assign]


def scale_within(layer: nn.Linear, residual: Residual) -> None:
    """The factors of LayerScale join the product before them, which need not be kept for their gradient then."""
    layer.forward = _forward(layer, residual)  # type: ignore[method-assign]
    residual.scaled = lambda branch, dtype: branch.to(dtype)  # type: ignore[method-assign]


def _forward(layer: nn.Linear, residual: Residual | None = None) -> Any:
    if isinstance(layer, MaskedKeyLinear):
        return lambda x: linear(x, layer.weight, layer.masked_bias)
    return lambda x: linear(x, layer.weight, layer.bias, None if residual is None else residual.gamma)


@contextmanager
def without_values() -> Iterator[None]:
    """Where only what `linear` keeps for its backward pass is wanted, it leaves the product out."""
    before = _EMPTY.set(True)
    try:
        yield
    finally:
        _EMPTY.reset(before)


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
        """dW is gamma times a product that has no gamma in it, and the same product, by W, is gamma's gradient."""
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
    """In the dtype of x."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if x.dtype != torch.float32 or why_not_packed() is not None:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
