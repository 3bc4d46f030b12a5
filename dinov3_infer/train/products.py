"""Linear layers of a step in float32 on a CPU, forwards and backwards, by oneDNN.

torch hands these products to a library that on many CPUs uses half of their vectors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import MaskedKeyLinear
from ..packed import why_not_packed

__all__ = ["Linear", "linear", "speed_up", "without_values"]

_EMPTY = ContextVar("_EMPTY", default=False)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: x [..., K], W [C, K], b [C]; `F.linear` wherever that is as fast."""
    plain = type(weight) in (Tensor, nn.Parameter) and x.numel() > 0
    single = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if not plain or not single or torch.is_autocast_enabled("cpu") or why_not_packed() is not None:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def speed_up(module: nn.Module) -> None:
    """All its linear layers compute with `linear`."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.forward = _forward(part)  # type: ignore[method-assign]


def _forward(layer: nn.Linear) -> Any:
    if isinstance(layer, MaskedKeyLinear):
        return lambda x: linear(x, layer.weight, layer.masked_bias)
    return lambda x: linear(x, layer.weight, layer.bias)


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
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty(*x.shape[:-1], len(weight)) if _EMPTY.get() else _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        return (
            _product(gradient, weight.T) if ctx.needs_input_grad[0] else None,
            _product(rows.T, x.flatten(0, -2).T) if ctx.needs_input_grad[1] else None,
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
