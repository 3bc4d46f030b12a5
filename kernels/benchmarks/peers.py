"""Rotation and attention as others write it, from the packed qkv projection: the contestants of the fused kernel.

Their own rotation is called where transformers or timm can be imported; elsewhere the equivalents in this file.  Tables
of sines and cosines, which a model computes once for all its blocks, are part of the inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from measure import imported
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dinov3_infer.model.attention import rope_attention
from dinov3_infer.model.rope import rope_periods, rope_table

PREFIX = 5  # class token and four registers
OP = torch.ops.dinov3_infer


@dataclass
class Inputs:
    """A packed projection, and the tables in the forms that the contestants take."""

    qkv: Tensor  # [B, N, 3, H, D], or packed [T, 3, H, D]
    cos: Tensor  # [N or T, D/2] float32
    sin: Tensor
    cu_seqlens: Tensor | None = None  # [S + 1] int32
    longest: int = 0
    tables: dict[str, tuple[Tensor, ...]] = field(init=False)

    def __post_init__(self) -> None:
        cos, sin = (torch.cat((t, t), dim=-1)[PREFIX:] for t in (self.cos, self.sin))  # [P, D]: all channels of patches
        self.tables = {
            "transformers": (cos.to(self.qkv.dtype), sin.to(self.qkv.dtype)),
            "timm": (torch.cat((sin, cos), dim=-1),),
            "reference": (cos, sin),
        }


Attention = Callable[[Inputs], Tensor]


def table(grid: tuple[int, int], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of an image of h x w patches."""
    return rope_table(grid, rope_periods(width).to(device), PREFIX)


# --- eager, as models are written ----------------------------------------------------------------------------------


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _turn_patches(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The prefix stays; in the dtype that x and the table promote to."""
    return torch.cat((x[:, :, :PREFIX], _turn(x[:, :, PREFIX:], cos, sin)), dim=2)


def _heads_first(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    return q, k, v


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H*D]."""
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _own_rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _turn_patches(q, cos, sin), _turn_patches(k, cos, sin)


def _own_rotation_joined(patches: Tensor, joined: Tensor, half: bool) -> Tensor:
    sin, cos = joined.chunk(2, dim=-1)
    return _turn(patches, cos, sin).to(patches.dtype)


_DINOV3 = "transformers.models.dinov3_vit.modeling_dinov3_vit"
_TRANSFORMERS = imported(_DINOV3, "apply_rotary_pos_emb") or _own_rotation
_TIMM = imported("timm.layers", "apply_rot_embed_cat") or _own_rotation_joined


def like_transformers(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotation in the dtype of the tokens."""
    q, k, v = _heads_first(qkv)
    return _attend(*_TRANSFORMERS(q, k, cos, sin), v)


def like_timm(qkv: Tensor, joined: Tensor) -> Tensor:
    """With a float32 table; rounded before the prefix is put back."""
    q, k, v = _heads_first(qkv)
    q, k = (torch.cat((t[:, :, :PREFIX], _TIMM(t[:, :, PREFIX:], joined, half=True)), dim=2).type_as(v) for t in (q, k))
    return _attend(q, k, v)


def like_reference(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """q and k in float32, rotated, and rounded.  (The reference also builds its tables in every block.)"""
    q, k, v = _heads_first(qkv)
    q, k = (_turn_patches(t.float(), cos, sin).to(v.dtype) for t in (q, k))
    return _attend(q, k, v)


def flex(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """For a compiler, which makes one kernel of the rotation and another of FlexAttention."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = _heads_first(qkv)
    q, k = (_turn_patches(t.float(), cos, sin).to(v.dtype) for t in (q, k))
    return flex_attention(q, k, v).transpose(1, 2).flatten(2)  # type: ignore[union-attr]


def on(function: Callable[..., Tensor], form: str, compile_for: torch.device | None = None) -> Attention:
    """A contestant from a function of tensors; compiled for exactly one shape.  A rehearsal compiles no code."""
    if compile_for is not None:
        backend = "inductor" if compile_for.type == "cuda" else "eager"
        function = torch.compile(function, dynamic=False, fullgraph=True, backend=backend)
    return lambda x: function(x.qkv, *x.tables[form])


# --- one kernel that rotates, then attention -----------------------------------------------------------------------


def rotation_and_sdpa(x: Inputs, backend: SDPBackend | None = None) -> Tensor:
    """With the backend that torch chooses, or the given one."""
    q, k = OP.rope_rotate(x.qkv, x.cos, x.sin).transpose(1, 3).unbind(2)  # [B, H, N, D]
    v = x.qkv[:, :, 2].transpose(1, 2)
    if backend is None:
        return _attend(q, k, v)
    with sdpa_kernel([backend]):
        return _attend(q, k, v)


def rotation_and_flash(x: Inputs, attend: Callable[..., Any]) -> Tensor:
    """FlashAttention's own packages, which take [B, N, H, D]."""
    q, k = OP.rope_rotate(x.qkv, x.cos, x.sin).unbind(2)
    out = attend(q, k, x.qkv[:, :, 2])
    return (out[0] if isinstance(out, tuple) else out).flatten(2)  # type: ignore[no-any-return]


# --- ours ----------------------------------------------------------------------------------------------------------


def fused(x: Inputs) -> Tensor:
    """The Triton kernel; on a CPU its definition in torch."""
    longest, scale = x.longest or x.qkv.shape[1], x.qkv.shape[-1] ** -0.5
    return OP.rope_attention(x.qkv, x.cos, x.sin, x.cu_seqlens, longest, scale)[0]  # type: ignore[no-any-return]


def auto(x: Inputs) -> Tensor:
    """As models call it: the kernel, or above the crossover one rotation and SDPA."""
    return rope_attention(x.qkv, x.cos, x.sin, cu_seqlens=x.cu_seqlens, max_seqlen=x.longest or None)


EAGER: dict[str, Callable[..., Tensor]] = {
    "transformers": like_transformers,
    "timm": like_timm,
    "reference": like_reference,
}
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
FLASH = {  # name in the tables: module, function
    "FlashAttention-2": ("flash_attn", "flash_attn_func"),
    "FlashAttention-3": ("flash_attn_interface", "flash_attn_func"),
    "FlashAttention-4": ("flash_attn.cute", "flash_attn_func"),
}


def differentiable(device: torch.device) -> dict[str, Attention]:
    """Those that have a gradient."""
    found: dict[str, Attention] = {"fused": fused, "auto": auto}
    found |= {name: on(call, name) for name, call in EAGER.items()}
    return found | {f"{name}, compiled": on(call, name, device) for name, call in EAGER.items()}


def contestants(device: torch.device) -> dict[str, Attention]:
    """All of them; one that cannot run raises when it is called."""
    found = differentiable(device) | {"rotation + SDPA": rotation_and_sdpa}
    found |= {f"rotation + {name}": partial(rotation_and_sdpa, backend=backend) for name, backend in BACKENDS.items()}
    found["FlexAttention, compiled"] = on(flex, "reference", device)
    for name, (module, function) in FLASH.items():
        if (attend := imported(module, function)) is not None:
            found[f"rotation + {name}"] = partial(rotation_and_flash, attend=attend)
    return found
