"""Attention over the packed qkv projection with RoPE: the torch definition, the operator, and the dispatch.

One signature serves images of one size (`[B, N, 3, H, D]`) and images of many sizes, concatenated (`[T, 3, H, D]` with
`cu_seqlens`).  The definition is the CPU path and the reference for the kernel.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import groupby
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..errors import UnsupportedError, check_choice
from .chips import constant_for_compilers, lacks_bfloat16, why_distrusted
from .rope import apply_rope
from .tracing import one_node

__all__ = [
    "IMPLEMENTATIONS",
    "eager_attention",
    "launch",
    "resolve_attention",
    "rope_attention",
    "sdpa_attention",
    "triton_attention",
    "why_not_triton",
]


# The definition


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return scaled_dot_product_attention(q, k, v, scale=scale)


@one_node
def sdpa_attention(
    qkv: Tensor,  # [B, N, 3, H, D], or packed [T, 3, H, D]
    cos: Tensor | None,  # [N or T, D/2], identity rows for class and register tokens; None: no rotation
    sin: Tensor | None,  # [N or T, D/2] float32, or float16 where qkv has 16 bits
    *,
    cu_seqlens: Tensor | None = None,  # [S + 1] int32, the first token of each sequence and T; packed input only
    max_seqlen: int | None = None,  # used by kernels only
    scale: float | None = None,
) -> Tensor:
    """`rope_attention` in plain torch, of its shape: one rotation of all tokens, one SDPA per run of equal lengths."""
    q, k, v = _rotated(qkv, cos, sin)
    parts = [
        _sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale).transpose(1, 2).flatten(2)
        for q, k, v in zip(*(_runs(t, cu_seqlens) for t in (q, k, v)), strict=True)
    ]
    return parts[0] if cu_seqlens is None else torch.cat([part.flatten(0, 1) for part in parts])


@one_node
def eager_attention(
    qkv: Tensor,  # [B, N, 3, H, D], or packed [T, 3, H, D]
    cos: Tensor | None,  # [N or T, D/2] float32
    sin: Tensor | None,  # [N or T, D/2] float32
    *,
    cu_seqlens: Tensor | None = None,  # [S + 1] int32
    max_seqlen: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """`rope_attention`, of its shape, with the whole score matrix in memory: to inspect, or to differentiate twice."""
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    return _joined([out for out, _ in _weighted(qkv, cos, sin, cu_seqlens, scale)], cu_seqlens)


def _weighted(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, cu_seqlens: Tensor | None, scale: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields per run of equal lengths the result [B, N, H*D] and scores [B, H, N, N]; softmax in float32 at least."""
    for q, k, v in zip(*(_runs(t, cu_seqlens) for t in _rotated(qkv, cos, sin)), strict=True):
        scores = _scores(q, k, scale)
        yield torch.einsum("bhqk, bkhd -> bqhd", scores.softmax(-1).to(v.dtype), v).flatten(2), scores


def _rotated(qkv: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unbind(-3)
    if cos is None or sin is None:
        return q, k, v
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v


def _runs(tokens: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    """[B, N, ...] unchanged, or packed [T, ...] as one view [count, length, ...] per run of equal lengths."""
    if cu_seqlens is None:
        return [tokens]
    runs = [(sum(1 for _ in run), length) for length, run in groupby(cu_seqlens.diff().tolist())]
    parts = tokens.split([count * length for count, length in runs])
    return [part.unflatten(0, run) for part, run in zip(parts, runs, strict=True)]


# The operator, which kernels implement and compilers do not look into

_REST = "Tensor? cos, Tensor? sin, Tensor? cu_seqlens, SymInt max_seqlen, float scale"
torch.library.define("dinov3_infer::rope_attention", f"(Tensor qkv, {_REST}) -> (Tensor out, Tensor lse)")
torch.library.define(
    "dinov3_infer::rope_attention_backward", f"(Tensor grad, Tensor qkv, {_REST}, Tensor out, Tensor lse) -> Tensor"
)


@torch.library.impl("dinov3_infer::rope_attention", "cpu")
def _forward(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The result of `rope_attention`, and log2 of the sum of each query's weights, [B, H, N] or [H, T]."""
    outs, sums = [], []
    for out, scores in _weighted(qkv, cos, sin, cu_seqlens, scale):
        outs.append(out)
        sums.append(scores.logsumexp(-1).transpose(1, 2) / math.log(2.0))
    return _joined(outs, cu_seqlens), _joined(sums, cu_seqlens).transpose(-1, -2).contiguous()


@torch.library.impl("dinov3_infer::rope_attention_backward", "cpu")
def _backward(
    grad: Tensor,  # of out
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> Tensor:
    """The gradient of qkv, of its shape: weights recomputed from scores and `lse`, the rotation undone at the end.

    With weights P, dP = dO V^T and delta = sum(dO O): dS = P (dP - delta) scale, dQ = dS K, dK = dS^T Q, dV = P^T dO.

    Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2.
    """
    heads, parts = qkv.shape[-2:], []
    tensors = (*_rotated(qkv, cos, sin), grad.unflatten(-1, heads), out.unflatten(-1, heads), lse.transpose(-1, -2))
    for q, k, v, do, o, total in zip(*(_runs(t, cu_seqlens) for t in tensors), strict=True):
        p = torch.exp2(_scores(q, k, scale) / math.log(2.0) - total.transpose(1, 2)[..., None])  # [B, H, N, N]
        q, k, v, do, o = (t.to(p.dtype) for t in (q, k, v, do, o))
        dp = torch.einsum("bqhd, bkhd -> bhqk", do, v)
        ds = p * (dp - (do * o).sum(-1).transpose(1, 2)[..., None]) * scale
        dq = torch.einsum("bhqk, bkhd -> bqhd", ds, k)
        dk = torch.einsum("bhqk, bqhd -> bkhd", ds, q)
        dv = torch.einsum("bhqk, bqhd -> bkhd", p, do)
        parts.append(torch.stack((dq, dk, dv), dim=2))
    opposite = -sin if sin is not None else None  # the inverse of a rotation
    return torch.stack(_rotated(_joined(parts, cu_seqlens), cos, opposite), dim=-3).to(qkv.dtype)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.einsum("bqhd, bkhd -> bhqk", q.to(wide), k.to(wide)) * scale


def _joined(parts: list[Tensor], cu_seqlens: Tensor | None) -> Tensor:
    return parts[0].contiguous() if cu_seqlens is None else torch.cat([part.flatten(0, 1) for part in parts])


@torch.library.impl("dinov3_infer::rope_attention", "meta")
def _forward_shapes(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    *lead, _, heads, width = qkv.shape
    wide = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty((*lead, heads * width)), qkv.new_empty((*lead[:-1], heads, lead[-1]), dtype=wide)


@torch.library.impl("dinov3_infer::rope_attention_backward", "meta")
def _backward_shapes(grad: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cos, sin, cu_seqlens, ctx.max_seqlen, ctx.scale = inputs
    ctx.save_for_backward(qkv, cos, sin, cu_seqlens, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    qkv, cos, sin, cu_seqlens, out, lse = ctx.saved_tensors
    dqkv = torch.ops.dinov3_infer.rope_attention_backward(
        grad.contiguous(), qkv, cos, sin, cu_seqlens, ctx.max_seqlen, ctx.scale, out, lse
    )
    return dqkv, None, None, None, None, None


torch.library.register_autograd("dinov3_infer::rope_attention", _differentiate, setup_context=_save)


@cache
def _kernels() -> ModuleType:
    """The Triton launchers, imported for the first tokens on a GPU, since importing Triton takes seconds."""
    from dinov3_infer_kernels import gpu

    count_flops()
    return gpu


torch.library.define("dinov3_infer::rope_rotate", "(Tensor qkv, Tensor cos, Tensor sin) -> Tensor")


@torch.library.impl("dinov3_infer::rope_rotate", "cpu")
def _rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotated q and k, [B, N, 2, H, D], for attention without rotation.  It has no gradient."""
    return torch.stack(_rotated(qkv, cos, sin)[:2], dim=-3)


@torch.library.impl("dinov3_infer::rope_rotate", "meta")
def _rotate_shapes(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    *lead, _, heads, width = qkv.shape
    return qkv.new_empty((*lead, 2, heads, width))


def launch(launcher: str, *arguments: Any) -> Any:
    """Call a launcher of the kernel package and return its result."""
    return getattr(_kernels(), launcher)(*arguments)


for _name, _launcher in (("attention", "forward"), ("attention_backward", "backward"), ("rotate", "rotate")):
    torch.library.impl(f"dinov3_infer::rope_{_name}", ("cuda", "xpu"), partial(launch, _launcher))


@cache
def count_flops() -> None:
    """Register the operators with torch's FLOP counter: 4 N^2 H D forward and 2.5 times that backward, as for SDPA."""
    from torch.utils.flop_counter import register_flop_formula

    def forward(qkv: Tensor, cos: Any, sin: Any, cu_seqlens: Tensor | None, *rest: Any, **others: Any) -> int:
        *lead, _, heads, width = qkv.shape
        pairs = math.prod(lead) * lead[-1] if cu_seqlens is None else int((cu_seqlens.diff().long() ** 2).sum())
        return 4 * pairs * heads * width

    def backward(grad: Tensor, *arguments: Any, **_: Any) -> int:
        return forward(*arguments) * 5 // 2

    register_flop_formula(torch.ops.dinov3_infer.rope_attention, get_raw=True)(forward)
    register_flop_formula(torch.ops.dinov3_infer.rope_attention_backward, get_raw=True)(backward)


# The dispatch


@cache
def _import_error() -> str | None:
    try:
        return _kernels().why_too_old()  # type: ignore[no-any-return]
    except ImportError as error:
        return f"'{error.name}' is not installed; on Linux, pip install 'dinov3-infer[triton]'"


@constant_for_compilers
def _not_installed() -> str | None:
    return _import_error()


def why_not_triton(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the Triton kernel cannot process such a qkv; None if it can."""
    if device.type not in ("cuda", "xpu"):
        return f"it runs on GPUs, and the model is on '{device.type}'"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it supports bfloat16, float16 and float32, and the tokens are {dtype}"
    if head_dim not in (64, 128):
        return f"it supports heads of 64 and 128 channels, and these have {head_dim}"
    if dtype == torch.float32 and head_dim == 128:
        return "float32 tiles of 128 channels do not fit the registers of a GPU"
    if lacks_bfloat16(device):
        return "it supports NVIDIA GPUs of compute capability 8.0 and above, and this one is older"
    if (reason := why_distrusted(device)) is not None:
        return reason
    return _not_installed()


@one_node
def rope_attention(
    qkv: Tensor,  # [B, N, 3, H, D], or packed [T, 3, H, D]
    cos: Tensor | None,  # [N or T, D/2], identity rows for class and register tokens; None: no rotation
    sin: Tensor | None,  # [N or T, D/2] float32, or float16 where qkv has 16 bits
    *,
    cu_seqlens: Tensor | None = None,  # [S + 1] int32, the first token of each sequence and T; packed input only
    max_seqlen: int | None = None,  # tokens of the longest sequence; saves reading cu_seqlens
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of rotated q and k, [B, N, H*D], or [T, H*D] for packed input, by the fastest implementation.

    Queries and keys are rotated by the angles of their tokens, values are not.  `scale` defaults to D^-0.5.  On a GPU
    this is the Triton kernel, with two exceptions: images of one size without rotation use SDPA, and images of one size
    without a gradient that are longer than the kernel's crossover use a rotation kernel and SDPA.  Where the kernel
    cannot run, see `why_not_triton`, this is `sdpa_attention`.

    Source: dinov3/layers/attention.py:19-38 and 114-135 at 6876159.
    """
    kind = (qkv.device, qkv.dtype, qkv.shape[-1])
    plain = cu_seqlens is None and cos is None
    if plain or why_not_triton(*kind) is not None:
        return sdpa_attention(qkv, cos, sin, cu_seqlens=cu_seqlens, scale=scale)
    differentiable = torch.is_grad_enabled() and qkv.requires_grad
    if cu_seqlens is None and not differentiable and qkv.shape[1] > _crossover(*kind):
        q, k = torch.ops.dinov3_infer.rope_rotate(qkv, cos, sin).transpose(1, 3).unbind(2)
        return _sdpa(q, k, qkv[:, :, 2].transpose(1, 2), scale).transpose(1, 2).flatten(2)
    return triton_attention(qkv, cos, sin, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, scale=scale)


@one_node
def triton_attention(
    qkv: Tensor,  # [B, N, 3, H, D], or packed [T, 3, H, D]
    cos: Tensor | None,  # [N or T, D/2] float32
    sin: Tensor | None,  # [N or T, D/2] float32
    *,
    cu_seqlens: Tensor | None = None,  # [S + 1] int32
    max_seqlen: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """`rope_attention` by the Triton kernel at any length.

    Raises: UnsupportedError, with the reason, if the kernel cannot run.
    """
    if (reason := why_not_triton(qkv.device, qkv.dtype, qkv.shape[-1])) is not None:
        raise UnsupportedError(f"the Triton attention cannot run: {reason}; use attn_implementation='auto'")
    if max_seqlen is None:
        max_seqlen = qkv.shape[1] if cu_seqlens is None else int(cu_seqlens.diff().max())
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.dinov3_infer.rope_attention(qkv, cos, sin, cu_seqlens, max_seqlen, scale)[0]  # type: ignore[no-any-return]


@constant_for_compilers
def _crossover(device: torch.device, dtype: torch.dtype, head_dim: int) -> int:
    return int(_kernels().crossover(device, dtype, head_dim))


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "auto": rope_attention,
    "triton": triton_attention,
    "sdpa": sdpa_attention,
    "eager": eager_attention,
}


def resolve_attention(name: str) -> Callable[..., Tensor]:
    """The function behind `attn_implementation`, see `rope_attention`.  Raises: InputError for an unknown name."""
    check_choice("attn_implementation", name, IMPLEMENTATIONS)
    return IMPLEMENTATIONS[name]
