"""Linear layers with weights packed for oneDNN, for inference on a CPU.

torch's `linear` repacks its weights in every call, and in float32 uses a library that on many CPUs runs at half of the
vector width.  Here weights are packed once, and the activation is part of the product.  Each row of the result depends
only on its own row of the input, bit for bit.

The operators are those that torch's compiler calls.  They are no public interface of torch, so each is first tested
against the plain form, and not used if it is missing, raises or differs.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PackedLinear", "QuantisedLinear", "runs_bfloat16", "smoothed", "why_not_int8", "why_not_packed"]

Activation = Literal["none", "gelu", "swish"]  # gelu: the exact form with erf


class PackedLinear:
    """x W^T + b with x and W in float32 or bfloat16."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = self.takes = dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype).contiguous())
        self.bias = None if bias is None else bias.detach().to(dtype, copy=True)
        self.product: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
        self.joined: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: Tensor, activation: Activation = "none") -> Tensor:
        """[T, K] from `taken` -> [T, C]."""
        return self.product(x, self.weight, self.bias, activation, [], "none")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """(x W^T + b) * other, for x [T, K] and other [T, C]."""
        return self.joined(x, other, self.weight, self.bias, "mul")

    def entering(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight [K, ...] and bias [K] of the preceding affine step, adapted so that `taken` accepts its result."""
        return weight, bias

    def taken(self, x: Tensor) -> Tensor:
        """x [T, K] in the input dtype of this layer."""
        return x.to(self.dtype)


class QuantisedLinear:
    """x W^T + b in 8 bits.

    Channel k of x is quantised to the grid middle[k] + size[k] (n - 128), n from 0 to 255, and clipped.  Each row of W,
    times these sizes, has one scale.  The bias absorbs the offset of the grid, and the rounding error of W times the
    mean of x.
    """

    def __init__(
        self,
        weight: Tensor,  # [C, K]
        bias: Tensor | None,
        middle: Tensor,  # [K]
        size: Tensor,  # [K]
        mean: Tensor,  # [K] of x
        dtype: torch.dtype = torch.float32,  # of the result
    ) -> None:
        self.middle, self.size = middle, size
        rows = weight.detach() * size
        self.scales = rows.abs().amax(1).clamp_min(1e-12) / 127
        whole = (rows / self.scales[:, None]).round()
        kept = whole * self.scales[:, None]
        base = kept @ (middle / size - 128) + (rows - kept) @ (mean / size)
        self.bias = base if bias is None else base + bias.detach()
        self.weight = torch.ops.onednn.qlinear_prepack(whole.to(torch.int8), None)
        self.takes = torch.uint8
        self.zeros = torch.zeros(len(rows), dtype=torch.int64, device="cpu")
        self.out: tuple[float, int, torch.dtype] = (1.0, 0, dtype)  # scale, zero and dtype of the result
        self.product: Callable[..., Tensor] = torch.ops.onednn.qlinear_pointwise.default

    def __call__(self, x: Tensor, activation: Activation = "none") -> Tensor:
        """[T, K] uint8 -> [T, C]."""
        return self.product(
            x, 1.0, 0, self.weight, self.scales, self.zeros, self.bias, *self.out, activation, [], "none"
        )

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """(x W^T + b) * other, for x [T, K] uint8 and other [T, C]."""
        return self(x).mul_(other)

    def entering(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight [K, ...] and bias [K] of the preceding affine step, adapted so that its result is in grid steps."""
        size = self.size if weight.ndim == 1 else self.size[:, None]
        return weight / size, ((0.0 if bias is None else bias) - self.middle) / self.size

    def taken(self, x: Tensor) -> Tensor:
        """Round x [T, K], in steps of the grid, to uint8; adding half a step rounds, since the conversion truncates."""
        if x.dtype == torch.uint8:
            return x
        return (x.float() + 128.5).clamp_(0, 255).to(torch.uint8)


def smoothed(low: Tensor, high: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Middle and size of each channel's grid, [K] each; x and the columns of W share differences of range.

    Args:
        low: Smallest input of each channel, [K].
        high: Largest input of each channel, [K].
        weight: [C, K].

    Source: SmoothQuant (arXiv 2211.10438), equation 4 with alpha 0.5, about the middle of each channel.
    """
    reach = ((high - low) / 2).clamp_min(1e-6)
    share = (reach / weight.detach().abs().amax(0).clamp_min(1e-6)).sqrt()
    return (low + high) / 2, share * (reach / share).amax() / 127


@cache
def why_not_packed(dtype: torch.dtype = torch.float32) -> str | None:
    """Why `PackedLinear` cannot be used here; None if it can."""
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    if dtype == torch.bfloat16 and not runs_bfloat16():
        return "this CPU has no products in bfloat16"

    def pairs() -> list[tuple[Tensor, Tensor]]:
        x, weight, bias, other = _examples(dtype)
        plain = F.linear(x.float(), weight.float(), bias.float())
        linear = PackedLinear(weight, bias, dtype)
        found = [(linear(x), plain), (linear(x, "gelu"), F.gelu(plain)), (linear(x, "swish"), F.silu(plain))]
        found.append((linear.times(x, other), plain * other))
        turned = torch.ops.mkldnn._linear_pointwise(x, weight.T.contiguous().T, None, "none", [], "")
        return [*found, (turned, plain - bias.float())]

    return _why_not(pairs, 1e-5 if dtype == torch.float32 else 0.1)


@cache
def why_not_int8() -> str | None:
    """Why `QuantisedLinear` cannot be used here; None if it can."""
    test: Any = getattr(torch.cpu, "_is_vnni_supported", None)
    if test is None or not test():
        return "this CPU has no products in 8 bits"

    def pairs() -> list[tuple[Tensor, Tensor]]:
        x, weight, bias, _ = _examples(torch.float32)
        plain = F.linear(x, weight, bias)
        linear = QuantisedLinear(weight, bias, *smoothed(x.amin(0), x.amax(0), weight), x.mean(0))
        x = linear.taken((x - linear.middle) / linear.size)
        found = [(linear(x), plain), (linear(x, "gelu"), F.gelu(plain))]
        linear.out = (0.05, 100, torch.uint8)
        return [*found, ((linear(x).float() - 100) * 0.05, plain.clamp(-5, 7.75))]

    return _why_not(pairs, 0.15)


def _examples(dtype: torch.dtype) -> tuple[Tensor, ...]:
    draw = torch.Generator("cpu").manual_seed(0)
    shapes = ((24, 48), (32, 48), (32,), (24, 32))
    return tuple((torch.randn(s, generator=draw, dtype=torch.float32, device="cpu") / 4).to(dtype) for s in shapes)


def _why_not(pairs: Callable[[], list[tuple[Tensor, Tensor]]], limit: float) -> str | None:
    try:
        wrong = any(not torch.allclose(a.float(), b.float(), atol=limit, rtol=limit) for a, b in pairs())
    except (AttributeError, RuntimeError, TypeError, NotImplementedError) as error:
        return f"torch {torch.__version__} has no such operator ({str(error).splitlines()[0][:80]})"
    return "its operators give other numbers than the plain form" if wrong else None


@cache
def runs_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions, so that torch need not emulate them."""
    tests: list[Any] = [getattr(torch.cpu, f"_is_{what}_supported", None) for what in ("avx512_bf16", "amx_tile")]
    return any(test is not None and test() for test in tests)
