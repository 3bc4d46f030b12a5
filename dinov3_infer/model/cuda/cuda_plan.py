"""The forward pass of a model with its own copy of the weights in 16 bits, in few kernels.

A block is a norm, four products, attention and an activation; LayerScale, the residual and the norm after them are one
kernel (see `fused`).  The stream stays float32, as in the plain path.  No tensor of the GPU is read on the host.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import rope_attention
from ..fused import layer_norm, residual_norm, swiglu, unfold
from ..layers import GatedMlp, MaskedKeyLinear
from ..network import BackboneOutput, LayerOutput, Outputs, Scale
from ..packing import Packing
from ..rope import RopeTable
from ..vit import VisionTransformer
from .graphs import Graphs

__all__ = ["TABLES", "CudaPlan"]

_GRIDS = 32  # sizes of images whose tables are kept
# Of cosines and sines, by the dtype of the tokens that they turn: bfloat16 rounds eight times as coarsely as float16.
TABLES = {torch.bfloat16: torch.float16, torch.float16: torch.float32}
_AS_GIVEN: Scale = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # of pixels that are normalised
_MIDDLE, _STEP = 128.0, 64.0  # (x - 128) / 64 of a whole number x from 0 to 255 is exact in 16 bits
_EXACT: Scale = ((_MIDDLE / 255,) * 3, (_STEP / 255,) * 3)
Linear: TypeAlias = tuple[Tensor, Tensor | None]  # weight [C_out, C_in], bias [C_out]


@dataclass(frozen=True)
class _Tables:
    """Tensors that all images of one grid and one scale share."""

    prefix: Tensor  # [1 + R, C] float32: class token and registers as they enter the first block
    weight: Tensor  # [C, 3 p^2] of the patch embedding, in 16 bits
    offset: Tensor  # [C] float32, added to each patch; with learned positions [P, C]
    scale: Scale  # with which pixels become the input of `weight`
    rope: RopeTable | None  # [N, D/2] each


class CudaPlan:
    """The forward pass of a model, without gradients, with a 16-bit copy of float32 weights.

    `dtype`: bfloat16 or float16, of the products, their inputs and outputs.
    `tanh`: GELU by its tanh form, which a product applies to its result; it differs by 5e-4 at most.
    """

    def __init__(self, model: VisionTransformer, dtype: torch.dtype, tanh: bool = False) -> None:
        self.config, self.dtype, self.tanh = model.config, dtype, tanh
        self.mode = "fast" if tanh else "exact"
        self.patches: dict[Scale, tuple[Tensor, Tensor, Scale]] = {}  # see `_embedding`
        self.blocks = [_Block(block, dtype, tanh) for block in model.blocks]
        self.norm = _Norm(model.norm)
        self.prefix_norm = None if model.cls_norm is None else _Norm(model.cls_norm)
        self.grids: OrderedDict[tuple[tuple[int, int], Scale], _Tables] = OrderedDict()
        self.graphs = Graphs()

    def __call__(
        self,
        model: VisionTransformer,  # of which the plan was made
        pixels: Sequence[Tensor],  # [B_i, 3, H_i, W_i]: uint8, or float32 and normalised; one tensor per size
        indices: Sequence[int] = (),  # blocks to keep
        scale: Scale = _AS_GIVEN,  # mean and standard deviation of uint8 images
        class_only: bool = False,  # no other tokens are needed, nor layers
    ) -> Outputs:
        """The outputs of the model for each tensor, with the blocks asked for as layers.

        With `class_only` registers and patches have no rows, and the last block computes class tokens alone.
        """
        tables = [self._tables(model, batch, scale if batch.dtype == torch.uint8 else _AS_GIVEN) for batch in pixels]
        key = (tuple(indices), scale, class_only)

        def run(given: Sequence[Tensor]) -> Outputs:
            return self._run(model, given, tables, tuple(indices), class_only)

        with torch.autocast(pixels[0].device.type, enabled=False):
            return self.graphs(run, pixels, key) if len(pixels) == 1 else run(pixels)

    def _run(
        self,
        model: VisionTransformer,
        pixels: Sequence[Tensor],
        tables: list[_Tables],
        indices: tuple[int, ...],
        class_only: bool,
    ) -> Outputs:
        streams = [self._entered(*both) for both in zip(pixels, tables, strict=True)]
        packing = Packing(tuple((s.shape[0], s.shape[1]) for s in streams), streams[0].device)
        where = _where(packing, [t.rope for t in tables])
        x = streams[0] if len(streams) == 1 else torch.cat([s.flatten(0, 1) for s in streams])
        kept: dict[int, Tensor] = {}
        h = self.blocks[0].norm1(x, self.dtype)
        for i, block in enumerate(self.blocks):
            attended, last = block.attended(h, where), i + 1 == len(self.blocks)
            if last and class_only:
                x, attended = _class_rows(x, packing), _class_rows(attended, packing)
            x, h = block.norm2.after(x, F.linear(attended, *block.proj), block.gammas[0], self.dtype)
            branch = block.branch(h)
            if last:
                x, h = self._normed(x, branch, block.gammas[1], packing)
            else:
                x, h = self.blocks[i + 1].norm1.after(x, branch, block.gammas[1], self.dtype)
            if i in indices:
                kept[i] = h if last else self._normed(x, None, None, packing)[1]
        total = h.sum()
        if class_only:
            return Outputs([_alone(tokens) for tokens in h.split([count for count, _ in packing.groups])], total)
        each = zip(*(_parts(stream, packing) for stream in (h, *(kept[i] for i in indices))), strict=True)
        outputs = []
        for tokens, *layers in each:
            outputs.append(BackboneOutput(*model.split(tokens), tuple(LayerOutput(*model.split(t)) for t in layers)))
        return Outputs(outputs, total)

    def _normed(
        self,
        x: Tensor,  # the stream, [B, N, C] or packed [T, C]; of class tokens alone [B, C]
        branch: Tensor | None,  # to be added first
        gamma: Tensor | None,
        packing: Packing,
    ) -> tuple[Tensor, Tensor]:
        """The stream and its final norm, float32 both."""
        class_only = len(x) == sum(count for count, _ in packing.groups) and x.ndim == 2
        own = self.prefix_norm
        norm = self.norm if own is None or not class_only else own
        x, h = (x, norm(x, torch.float32)) if branch is None else norm.after(x, branch, gamma, torch.float32)
        if own is not None and not class_only:
            for part, out in zip(_parts(x, packing), _parts(h, packing), strict=True):
                prefix = part.narrow(1, 0, self.config.num_prefix)
                out.narrow(1, 0, self.config.num_prefix).copy_(own(prefix.contiguous(), torch.float32))
        return x, h

    def _entered(self, batch: Tensor, tables: _Tables) -> Tensor:
        """Class token, registers and patches before the first block, [B, N, C] float32."""
        rows = unfold(batch, *tables.scale, self.config.patch_size, self.dtype)
        patches = F.linear(rows, tables.weight)
        prefix = len(tables.prefix)
        x = patches.new_empty(len(batch), prefix + patches.shape[1], patches.shape[2], dtype=torch.float32)
        x.narrow(1, 0, prefix).copy_(tables.prefix)
        torch.add(patches, tables.offset, out=x.narrow(1, prefix, patches.shape[1]))
        return x

    def _tables(self, model: VisionTransformer, batch: Tensor, scale: Scale) -> _Tables:
        grid = _grid(batch, self.config.patch_size)
        found = self.grids.get((grid, scale))
        if found is None:
            weight, bias, way = self._embedding(model, scale)
            prefix = self.config.num_prefix
            empty = torch.zeros(1, grid[0] * grid[1], self.config.embed_dim, dtype=torch.float32, device=model.device)
            template = model.with_prefix(empty, grid).squeeze(0)
            rope = model.rope(grid)
            found = self.grids[grid, scale] = _Tables(
                template.narrow(0, 0, prefix).clone(),
                weight,
                bias if rope is not None else template.narrow(0, prefix, len(template) - prefix) + bias,
                way,
                None if rope is None else (rope[0].to(TABLES[self.dtype]), rope[1].to(TABLES[self.dtype])),
            )
            if len(self.grids) > _GRIDS:
                self.grids.popitem(last=False)
        return found

    def _embedding(self, model: VisionTransformer, scale: Scale) -> tuple[Tensor, Tensor, Scale]:
        """Weight [C, 3 p^2] and float32 bias [C] of the patch embedding, and the scale of the pixels that it takes.

        uint8 goes in as whole numbers that 16 bits hold exactly: mean and standard deviation become part of float32
        weights before these are rounded, so that the pixels are not.
        """
        if (found := self.patches.get(scale)) is None:
            embed: Any = model.patch_embed.proj
            weight, bias = embed.weight.detach(), embed.bias.detach().to(torch.float32)
            way = scale
            if scale != _AS_GIVEN and weight.dtype == torch.float32:
                way = _EXACT
                vectors = (torch.tensor(v, dtype=torch.float64, device="cpu").view(3, 1, 1) for v in scale)
                mean, std = (vector.to(weight.device) for vector in vectors)
                wide = weight.to(torch.float64)
                bias = (bias + (wide * ((_MIDDLE / 255 - mean) / std)).sum((1, 2, 3))).to(torch.float32)
                weight = wide * (_STEP / 255 / std)
            found = self.patches[scale] = (weight.to(self.dtype).flatten(1), bias, way)
        return found


class _Norm:
    """A layer norm of the stream, alone or with a branch added before it."""

    def __init__(self, norm: Any) -> None:
        self.weight, self.bias, self.eps = _kept(norm.weight, torch.float32), _kept(norm.bias, torch.float32), norm.eps

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps, dtype)

    def after(self, x: Tensor, branch: Tensor, gamma: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """x + gamma branch, and the norm of that."""
        return residual_norm(x, branch, gamma, self.weight, self.bias, self.eps, dtype)


class _Block:
    def __init__(self, block: Any, dtype: torch.dtype, tanh: bool) -> None:
        attn, mlp = block.attn, block.mlp
        self.heads, self.tanh, self.gated = attn.num_heads, tanh, isinstance(mlp, GatedMlp)
        self.norm1, self.norm2 = _Norm(block.norm1), _Norm(block.norm2)
        self.gammas = [None if r.gamma is None else _kept(r.gamma, torch.float32) for r in (block.ls1, block.ls2)]
        bias = attn.qkv.masked_bias if isinstance(attn.qkv, MaskedKeyLinear) else attn.qkv.bias
        self.qkv: Linear = (_kept(attn.qkv.weight, dtype), None if bias is None else _kept(bias, dtype))
        self.proj = _linear(attn.proj, dtype)
        up, down = (mlp.gate_up, mlp.down) if self.gated else (mlp.fc1, mlp.fc2)
        self.up, self.down = _linear(up, dtype), _linear(down, dtype)

    def attended(self, h: Tensor, where: "_Where") -> Tensor:
        """The output of attention before its last product, in the shape of h."""
        cos, sin, cu_seqlens, longest = where
        qkv = F.linear(h, *self.qkv).unflatten(-1, (3, self.heads, -1))
        return rope_attention(qkv, cos, sin, cu_seqlens=cu_seqlens, max_seqlen=longest)

    def branch(self, h: Tensor) -> Tensor:
        """The output of the MLP."""
        if self.gated:
            return F.linear(swiglu(F.linear(h, *self.up)), *self.down)
        if self.tanh:
            weight, bias = self.up
            wide = torch._addmm_activation(bias, h.flatten(0, -2), weight.T, use_gelu=True)  # type: ignore[arg-type]
            return F.linear(wide.view(*h.shape[:-1], -1), *self.down)
        return F.linear(F.gelu(F.linear(h, *self.up)), *self.down)


_Where: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None, int]  # cos, sin, cu_seqlens, longest


def _where(packing: Packing, tables: list[RopeTable | None]) -> _Where:
    """The arguments of attention beside q, k and v."""
    known = [table for table in tables if table is not None]
    if len(packing.groups) == 1:
        cos, sin = known[0] if known else (None, None)
        return cos, sin, None, packing.longest
    cos, sin = packing.table(known) if known else (None, None)
    lengths = (length for count, length in packing.groups for _ in range(count))
    starts = torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32, device="cpu")
    starts = starts.pin_memory() if torch.cuda.is_available() else starts  # or the host would wait for the copy
    return cos, sin, starts.to(packing.device, non_blocking=True), packing.longest


def _parts(tokens: Tensor, packing: Packing) -> list[Tensor]:
    """[B, N, C] of each size."""
    return [tokens] if tokens.ndim == 3 else packing.split(tokens)


def _class_rows(tokens: Tensor, packing: Packing) -> Tensor:
    """The rows of the class tokens, [B, C]."""
    return torch.cat([part.select(1, 0) for part in _parts(tokens, packing)])


def _alone(tokens: Tensor) -> BackboneOutput:
    """Class tokens [B, C] without others."""
    none = tokens.new_empty(len(tokens), 0, tokens.shape[1])
    return BackboneOutput(tokens, none, none)


def _linear(linear: Any, dtype: torch.dtype) -> Linear:
    return _kept(linear.weight, dtype), None if linear.bias is None else _kept(linear.bias, dtype)


def _kept(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In this dtype; a tensor that has it already shares its memory with the model."""
    return tensor.detach().to(dtype)


def _grid(pixels: Tensor, size: int) -> tuple[int, int]:
    return pixels.shape[2] // size, pixels.shape[3] // size
