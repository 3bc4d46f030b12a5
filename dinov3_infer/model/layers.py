"""The parts of a vision transformer, from config to block.

The residual stream is float32 at least, whatever the dtype of the weights: register tokens of the large models exceed
the range of float16, and bfloat16 loses small updates.  So norms compute in the dtype of the stream, and every linear
layer casts its input to the dtype of its weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, check_choice
from .attention import resolve_attention, rope_attention, triton_attention, why_not_triton
from .packing import Packing
from .positions import PositionResize
from .rope import RopeTable
from .tracing import one_node

__all__ = [
    "Block", "LayerNorm", "PatchEmbed", "ViTConfig", "entering", "narrowed", "project",
    "widened", "with_enough_rows", "with_gradient", "with_masks",
]  # fmt: skip

_FEW_ROWS = 16


@dataclass(frozen=True)
class ViTConfig:
    """The architecture of a vision transformer; the defaults are those of the released DINOv3 models."""

    embed_dim: int  # C
    depth: int  # blocks
    num_heads: int  # H
    ffn_dim: int  # hidden width of the FFN
    gated: bool = False  # SwiGLU: down(silu(gate(x)) * up(x)); else fc2(gelu(fc1(x)))
    patch_size: int = 16  # pixels
    num_registers: int = 4  # R
    position_grid: int | None = None  # side of the learned position table in patches; None: RoPE
    position_resize: PositionResize = "antialias"  # see `resize_positions`
    rope_base: float = 100.0
    qkv_bias: bool = True
    key_bias: bool = False  # False: the key third of the qkv bias is zero and stays so
    layerscale: bool = True
    mask_token: bool = True
    prefix_norm: bool = False  # class and register tokens have a separate final norm (`cls_norm`)
    local_cls_norm: bool = False  # and another final norm for local crops in training
    norm_eps: float = 1e-5
    in_chans: int = 3  # channels of an image
    hidden_size, num_hidden_layers = property(lambda c: c.embed_dim), property(lambda c: c.depth)  # transformers' names
    num_attention_heads, num_register_tokens = property(lambda c: c.num_heads), property(lambda c: c.num_registers)

    def __post_init__(self) -> None:
        for name in ("embed_dim", "depth", "num_heads", "ffn_dim", "patch_size", "in_chans"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give a whole number above 0")
        if self.num_registers < 0:
            raise InputError(f"num_registers is {self.num_registers}; give 0 or more")
        check_choice("position_resize", self.position_resize, PositionResize)
        if self.head_dim * self.num_heads != self.embed_dim or (self.position_grid is None and self.head_dim % 4):
            raise InputError(
                f"embed_dim {self.embed_dim} does not split into {self.num_heads} heads of a whole width"
                f"{'' if self.position_grid else ' divisible by 4'}; change num_heads"
            )

    @property
    def head_dim(self) -> int:
        """D."""
        return self.embed_dim // self.num_heads

    @property
    def resizes_in_float32(self) -> bool:
        """Whether positions are resized in float32; Meta's DINO and transformers' ViT use their weights' dtype."""
        return self.layerscale or self.position_resize == "antialias"

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: 1 + R."""
        return 1 + self.num_registers


def entering(x: Tensor, module: nn.Module) -> Tensor:
    """Cast the input x of a linear layer or convolution, of any shape, see `_cast`."""
    return _cast(x, module.weight)


@one_node
def _cast(x: Tensor, weight: Any) -> Tensor:
    """x in the dtype of the weights; unchanged if a quantiser has left no floats of 16 bits or more."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.itemsize < 2:
        return x
    widens = x.itemsize == 2 and weight.dtype == torch.float32
    if widens and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return x  # autocast narrows it again: widening would cost two passes over memory and change no bit
    return x.to(weight.dtype)


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """Call a linear layer, [..., K] -> [..., C], in the dtype of its weights; as a module, so that adapters run."""
    return with_enough_rows(linear, entering(x, linear))


def with_enough_rows(linear: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call a linear function of the last dimension, [..., K] -> [..., C].

    On a CPU it pads fewer than 12 rows: their kernel rounds differently, so small images would depend on their batch.
    """
    return _without_filling(linear(_filled(x)), x)


@one_node
def _filled(x: Tensor) -> Tensor:
    if x.device.type != "cpu" or torch.compiler.is_compiling() or (rows := x.shape[:-1].numel()) >= _FEW_ROWS:
        return x
    return F.pad(x.flatten(0, -2), (0, 0, 0, _FEW_ROWS - rows))


def narrowed(table: RopeTable, weight: Tensor, attend: Any) -> RopeTable:
    """The table, [N, D/2] each, in float16 if a kernel reads it beside bfloat16 tokens, whose rounding is coarser."""
    return _narrowed(table, weight, attend in (rope_attention, triton_attention))


@one_node
def _narrowed(table: RopeTable, weight: Tensor, by_kernel: bool) -> RopeTable:
    kind = weight.device.type
    if kind not in ("cuda", "xpu") or not by_kernel:
        return table
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    if dtype != torch.bfloat16 or why_not_triton(weight.device, dtype, 2 * table[0].shape[-1]) is not None:
        return table
    return table[0].half(), table[1].half()


@one_node
def _without_filling(found: Tensor, x: Tensor) -> Tensor:
    """Cut the padding of `_filled` from the result for x."""
    if found.shape[:-1] == x.shape[:-1]:
        return found
    return found[: x.shape[:-1].numel()].unflatten(0, x.shape[:-1])  # type: ignore[no-any-return]


@one_node
def widened(x: Tensor) -> Tensor:
    """Cast x, of any shape, to float32 if its dtype is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@one_node
def with_masks(x: Tensor, masks: Tensor | None, token: Tensor | None) -> Tensor:
    """Patches [B, P, C] with the mask token where `masks` [B, P] is True.

    Raises: InputError if the model has no mask token, or the masks have another dtype or shape.
    """
    if masks is None:
        return x
    if token is None:
        raise InputError("this model has no mask token (its file holds none); leave masks out")
    if masks.dtype != torch.bool or masks.shape != x.shape[:2]:
        raise InputError(
            f"masks must be bool {list(x.shape[:2])}, got {masks.dtype} {list(masks.shape)}; give one bool per patch"
        )
    return torch.where(masks[..., None], token.to(x.dtype), x)


@one_node
def with_gradient(prefix: Tensor, token: Tensor) -> Tensor:
    """`prefix` [1, 1, C] unchanged, with a zero gradient for the mask token, which DDP waits for even without masks."""
    return prefix.add(token[:0].sum()) if torch.is_grad_enabled() and token.requires_grad else prefix


@one_node
def _silu(x: Tensor) -> Tensor:
    """x * sigmoid(x), without torch's CPU kernel, whose rounding depends on the share of a thread."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
        return F.silu(x)
    return x / (1.0 + torch.exp(-x))  # which has no gradient below -88


class LayerNorm(nn.LayerNorm):
    """Layer norm in the dtype of its input, whatever the dtype of its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C] in the dtype of x."""
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class PatchEmbed(nn.Module):
    """Embeds patches with one convolution."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, config.patch_size)
        # timm's names; the grid of learned positions, or DINOv3's 16 patches a side
        self.patch_size = (config.patch_size, config.patch_size)
        self.grid_size = (config.position_grid or 16, config.position_grid or 16)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, in_chans, H_px, W_px] -> one token per patch, [B, P, C], row-major."""
        return self.proj(entering(pixels, self.proj)).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class MaskedKeyLinear(nn.Linear):
    """The qkv projection of DINOv3, in which the key third of the bias counts as zero and gets no gradient."""

    @property
    def masked_bias(self) -> Tensor:
        """The bias with a zero key third, [3*C]."""
        query, key, value = self.bias.chunk(3)
        return torch.cat((query, torch.zeros_like(key), value))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., 3*C]."""
        return F.linear(x, self.weight, self.masked_bias)


class Attention(nn.Module):
    """Multi-head self-attention with RoPE."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        linear = nn.Linear if config.key_bias or not config.qkv_bias else MaskedKeyLinear
        self.num_heads = config.num_heads
        self.qkv = linear(config.embed_dim, 3 * config.embed_dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.attend = resolve_attention("auto")

    def forward(
        self,
        x: Tensor,  # [B, N, C] or packed [T, C]
        rope: RopeTable | None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Multi-head attention, of the shape of x."""
        qkv = project(self.qkv, x).unflatten(-1, (3, self.num_heads, -1))
        cos, sin = rope if rope is not None else (None, None)
        return project(self.proj, self.attend(qkv, cos, sin, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen))


class Mlp(nn.Module):
    """Two linear layers with GELU."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return project(self.fc2, self.activate(project(self.fc1, x)))

    def activate(self, hidden: Tensor) -> Tensor:
        """[..., ffn_dim] -> [..., ffn_dim]."""
        return F.gelu(hidden)


class GatedMlp(nn.Module):
    """SwiGLU with gate and up projection in one linear layer."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.embed_dim, 2 * config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return project(self.down, self.activate(project(self.gate_up, x)))

    def activate(self, hidden: Tensor) -> Tensor:
        """[..., 2*ffn_dim] -> [..., ffn_dim]."""
        gate, up = hidden.chunk(2, dim=-1)
        return _silu(gate) * up


class Residual(nn.Module):
    """Casts a branch to the dtype of the stream, and scales its channels by `gamma` if the model has LayerScale."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(config.embed_dim)) if config.layerscale else None

    def forward(self, branch: Tensor, dtype: torch.dtype) -> Tensor:
        """[..., C] -> [..., C] of this dtype."""
        branch = branch.to(dtype)
        return branch if self.gamma is None else branch * self.gamma.to(dtype)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.embed_dim, config.norm_eps)
        self.attn = Attention(config)
        self.ls1 = Residual(config)
        self.norm2 = LayerNorm(config.embed_dim, config.norm_eps)
        self.mlp = GatedMlp(config) if config.gated else Mlp(config)
        self.ls2 = Residual(config)

    def attention_branch(
        self,
        x: Tensor,  # [B, N, C] or packed [T, C]
        rope: RopeTable | None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """The attention branch, which is added to the stream, in its shape and dtype."""
        return self.ls1(self.attn(self.norm1(x), rope, cu_seqlens, max_seqlen), x.dtype)  # type: ignore[no-any-return]

    def mlp_branch(self, x: Tensor) -> Tensor:
        """The MLP branch of x, [B, N, C] or [T, C], which is added to the stream, in its shape and dtype."""
        return self.ls2(self.mlp(self.norm2(x)), x.dtype)  # type: ignore[no-any-return]

    def forward(
        self,
        x: Tensor,  # [B, N, C] or packed [T, C]
        rope: RopeTable | None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """The stream after the block, of the shape of x."""
        x = x + self.attention_branch(x, rope, cu_seqlens, max_seqlen)
        return x + self.mlp_branch(x)

    def forward_dropped(
        self,
        x: Tensor,  # packed [T, C]
        tables: Sequence[RopeTable] | None,  # one per group of the packing
        packing: Packing,
        drop_path: float,
        generator: torch.Generator | None,
    ) -> Tensor:
        """The stream after the block, [T, C]; each branch runs on its own random subset of the images."""
        rows, kept, factor = packing.draw(drop_path, generator)
        rope = kept.table(tables) if tables is not None else None
        branch = self.attention_branch(x[rows], rope, kept.cu_seqlens(), kept.longest)
        x = x.index_add(0, rows, branch * factor.to(x.dtype))
        rows, kept, factor = packing.draw(drop_path, generator)
        return x.index_add(0, rows, self.mlp_branch(x[rows]) * factor.to(x.dtype))
