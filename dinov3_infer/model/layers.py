"""The parts of a vision transformer, from config to block.

The residual stream is float32 at least, whatever the weights are: register tokens of the large models leave the range
of float16, and bfloat16 loses small updates.  So norms compute in the dtype of the stream, and every linear casts what
it is given to the dtype of its weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, check_choice
from .attention import resolve_attention
from .packing import Packing
from .rope import RopeTable

__all__ = [
    "Block",
    "LayerNorm",
    "PatchEmbed",
    "PositionResize",
    "ViTConfig",
    "entering",
    "project",
    "resize_positions",
    "with_enough_rows",
]

PositionResize = Literal["offset", "size", "antialias"]
_FEW_ROWS = 16


@dataclass(frozen=True)
class ViTConfig:
    """What the weights cannot do without; the defaults are what the released DINOv3 models share."""

    embed_dim: int  # C
    depth: int  # blocks
    num_heads: int  # H
    ffn_dim: int  # hidden width of the FFN as built
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
    prefix_norm: bool = False  # class and register tokens have a final norm of their own (`cls_norm`)
    local_cls_norm: bool = False  # and another one for local crops in training
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("embed_dim", "depth", "num_heads", "ffn_dim", "patch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give a whole number above 0")
        if self.num_registers < 0:
            raise InputError(f"num_registers is {self.num_registers}; give 0 or more")
        check_choice("position_resize", self.position_resize, PositionResize)
        width = self.embed_dim // self.num_heads
        if width * self.num_heads != self.embed_dim or (self.position_grid is None and width % 4):
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
        """Meta's DINO and transformers' ViT resize positions in the dtype of their weights, all others in float32."""
        return self.layerscale or self.position_resize == "antialias"

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: 1 + R."""
        return 1 + self.num_registers


def cubic_kernel(x: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel; torch takes a = -0.75, and -0.5 where it filters."""
    x = x.abs()
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a
    return torch.where(x <= 1.0, near, torch.where(x < 2.0, far, 0.0))


def resize_positions(
    positions: Tensor,  # [1, G*G, C] learned for a square grid of G patches a side
    grid: tuple[int, int],  # h, w in patches
    rule: PositionResize,
    dtype: torch.dtype = torch.float32,  # of the arithmetic
) -> Tensor:
    """Learned positions for another grid, [1, h*w, C], bicubic; three rules are in use, whose features differ by 1 %.

    offset: Meta's DINO and DINOv2 without registers.  The factor is (h + 0.1)/G, and sampling follows that factor.
    size: transformers' DINO and DINOv2 without registers.  Exactly from G to h.
    antialias: models with registers, and timm.  Exactly from G to h, with a low-pass filter when shrinking.
    """
    side = int(positions.shape[1] ** 0.5)
    if grid == (side, side):
        return positions
    table = positions.to(dtype).unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if rule == "offset":
        factors = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
        table = F.interpolate(table, scale_factor=factors, mode="bicubic")
    else:
        table = F.interpolate(table, size=grid, mode="bicubic", antialias=rule == "antialias")
    return table.flatten(2).transpose(1, 2).to(positions.dtype)


def entering(x: Tensor, module: nn.Module) -> Tensor:
    """x in the dtype of the weights that it meets; as it is where a quantiser has left no floats of 16 bits or more.

    Where autocast is to narrow it again it stays too: to widen it would cost two passes over memory and change no bit.
    """
    weight = module.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.itemsize < 2:
        return x
    widens = x.itemsize == 2 and weight.dtype == torch.float32
    if widens and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(weight.dtype)


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """Calls a linear in the dtype of its weights; always as a module, so that adapters and quantisers take part."""
    return with_enough_rows(linear, entering(x, linear))


def with_enough_rows(linear: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Calls a linear function of the last dimension.

    On a CPU fewer than 12 rows go to another kernel, which rounds differently, and a picture of a few patches would get
    another vector alone than in a batch: they are filled up.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or (rows := x.shape[:-1].numel()) >= _FEW_ROWS:
        return linear(x)
    filled = F.pad(x.flatten(0, -2), (0, 0, 0, _FEW_ROWS - rows))
    return linear(filled)[:rows].unflatten(0, x.shape[:-1])  # type: ignore[no-any-return]


def _silu(x: Tensor) -> Tensor:
    """x * sigmoid(x).

    torch's own CPU kernel rounds differently where the share of a thread ends inside a vector, so that a picture's
    vector would depend on its batch.  The form here does not, but has no gradient below -88.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
        return F.silu(x)
    return x / (1.0 + torch.exp(-x))


class LayerNorm(nn.LayerNorm):
    """Layer norm in the dtype of its input, whatever the dtype of its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class PatchEmbed(nn.Module):
    """[B, 3, H_px, W_px] -> one token per patch, [B, P, C], row-major."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.embed_dim, config.patch_size, config.patch_size)
        # timm's names; the grid is that of learned positions, or DINOv3's 16 patches a side
        self.patch_size = (config.patch_size, config.patch_size)
        self.grid_size = (config.position_grid or 16, config.position_grid or 16)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(entering(pixels, self.proj)).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class MaskedKeyLinear(nn.Linear):
    """The qkv projection of DINOv3: the key third of its bias counts as zero and gets no gradient."""

    @property
    def masked_bias(self) -> Tensor:
        query, key, value = self.bias.chunk(3)
        return torch.cat((query, torch.zeros_like(key), value))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.masked_bias)


class Attention(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width = config.embed_dim
        linear = nn.Linear if config.key_bias or not config.qkv_bias else MaskedKeyLinear
        self.num_heads = config.num_heads
        self.qkv = linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        self.attend = resolve_attention("auto")

    def forward(
        self,
        x: Tensor,  # [B, N, C] or packed [T, C]
        rope: RopeTable | None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        qkv = project(self.qkv, x).unflatten(-1, (3, self.num_heads, -1))
        cos, sin = rope if rope is not None else (None, None)
        return project(self.proj, self.attend(qkv, cos, sin, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen))


class Mlp(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return project(self.fc2, self.activate(project(self.fc1, x)))

    def activate(self, hidden: Tensor) -> Tensor:
        return F.gelu(hidden)


class GatedMlp(nn.Module):
    """SwiGLU with gate and up in one linear."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.embed_dim, 2 * config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return project(self.down, self.activate(project(self.gate_up, x)))

    def activate(self, hidden: Tensor) -> Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        return _silu(gate) * up


class Residual(nn.Module):
    """A branch in the dtype of the stream, each channel times `gamma` (LayerScale) where the model has one."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(config.embed_dim)) if config.layerscale else None

    def forward(self, branch: Tensor, dtype: torch.dtype) -> Tensor:
        branch = branch.to(dtype)
        return branch if self.gamma is None else branch * self.gamma.to(dtype)


class Block(nn.Module):
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
        """What is added to the stream, of its shape and dtype."""
        return self.ls1(self.attn(self.norm1(x), rope, cu_seqlens, max_seqlen), x.dtype)  # type: ignore[no-any-return]

    def mlp_branch(self, x: Tensor) -> Tensor:
        """What is added to the stream, of its shape and dtype."""
        return self.ls2(self.mlp(self.norm2(x)), x.dtype)  # type: ignore[no-any-return]

    def forward(
        self,
        x: Tensor,  # [B, N, C] or packed [T, C]
        rope: RopeTable | None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
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
        """Each branch runs on a subset of the pictures of its own."""
        rows, kept, factor = packing.draw(drop_path, generator)
        rope = kept.table(tables) if tables is not None else None
        branch = self.attention_branch(x[rows], rope, kept.cu_seqlens(), kept.longest)
        x = x.index_add(0, rows, branch * factor.to(x.dtype))
        rows, kept, factor = packing.draw(drop_path, generator)
        return x.index_add(0, rows, self.mlp_branch(x[rows]) * factor.to(x.dtype))
