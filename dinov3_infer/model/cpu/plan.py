"""The forward pass of a model with weights of its own, in the form that a CPU computes with fastest.

The weights are packed once (see `linear`) with LayerScale and the softmax scale in them, and a few images at a time
go through a block.  What lies between two products is one pass of compiled C (see `compiled`); where that cannot be, q
and k are turned by one complex product, for which the channels of a pair lie side by side, and attention is made of
packed products.  What each step brings is in tests/benchmarks/records/plan_steps.md.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...system import keep_freed_memory
from ..layers import GatedMlp, MaskedKeyLinear
from ..network import BackboneOutput, LayerOutput, Scale
from ..vit import VisionTransformer
from .compiled import passes, why_not_compiled
from .linear import PackedLinear, QuantisedLinear, smoothed

__all__ = ["CpuPlan", "Spans", "spans_of"]

Spans: TypeAlias = dict[str, tuple[Tensor, Tensor, Tensor]]  # least, largest and mean input of each channel of a linear
_ROWS = 512  # at a time for each thread: what is computed of them stays in the cache
_SCORES = 1 << 20  # of q k^T at a time: for the cache too, and so that large images need no more memory
_FEW_ROWS = 16  # a single row goes to another kernel, which rounds differently
_GRIDS = 32  # sizes of images whose tables are kept
# x W^T with W as it is: torch's own products in float32 have the fault that `linear` speaks of
_PRODUCT: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_REST: tuple[Any, ...] = (None, "none", [], "")


class CpuPlan:
    """What a model computes of float32 pixels, without gradients; a second copy of its weights.

    `dtype`: float32 or bfloat16, of the products; the stream, norms and RoPE are float32.
    `spans`: of every block, see `spans_of`; with them the linears of the blocks are in 8 bits.
    """

    def __init__(self, model: VisionTransformer, dtype: torch.dtype, spans: Sequence[Spans] | None = None) -> None:
        self.config, self.dtype = model.config, dtype
        self.mode = "int8" if spans is not None else "exact" if dtype == torch.float32 else "fast"
        keep_freed_memory()
        embed: Any = model.patch_embed.proj
        self.patches = PackedLinear(embed.weight.flatten(1), embed.bias, self.dtype)
        self.fused = why_not_compiled(dtype, self.config.head_dim) is None
        pairs = model.rope_periods is not None and not self.fused
        each: Sequence[Spans | None] = [None] * len(model.blocks) if spans is None else spans
        self.blocks = [_Block(*both, pairs, self.fused, dtype) for both in zip(model.blocks, each, strict=True)]
        self.grids: OrderedDict[tuple[int, int], tuple[Tensor, Tensor | None]] = OrderedDict()

    def __call__(
        self,
        model: VisionTransformer,  # whose plan this is
        pixels: Sequence[Tensor],  # [B_i, 3, H_i, W_i] float32, normalised: one tensor per size
        indices: Sequence[int] = (),  # blocks to keep
        scale: Scale | None = None,  # of uint8, which is not given to a CPU
        class_only: bool = False,  # no other tokens are wanted, nor layers
    ) -> list[BackboneOutput]:
        """What the model gives for each tensor, with the blocks asked for as its layers.

        With `class_only` registers and patches have no rows, and the last block computes class tokens alone, whose bits
        are the same, since no row of a product depends on another.
        """
        parts = [list(self._entered(model, batch)) for batch in pixels]
        kept: dict[int, list[list[Tensor]]] = {}
        for i, block in enumerate(self.blocks):
            for part in chain.from_iterable(parts):
                block(part, class_only and i + 1 == len(self.blocks))
            if i in indices:
                kept[i] = [[part.tokens() for part in own] for own in parts]

        def named(streams: list[Tensor], count: int) -> tuple[Tensor, Tensor, Tensor]:
            """Without the images that were repeated."""
            return model.split(model.normed(torch.cat(streams)[:count]))

        return [
            BackboneOutput(
                *named([part.tokens() for part in own], len(batch)),
                tuple(LayerOutput(*named(kept[i][number], len(batch))) for i in indices),
            )
            for number, (own, batch) in enumerate(zip(parts, pixels, strict=True))
        ]

    def _entered(self, model: VisionTransformer, batch: Tensor) -> Iterator["_Part"]:
        """The tokens before the first block, as many images at a time as the caches are good for."""
        template, turns = self._tables(model, model.grid_of(batch))
        length, prefix = template.shape[1], self.config.num_prefix
        if (rows := len(batch) * (length - prefix)) < _FEW_ROWS:
            batch = batch.repeat(-(-_FEW_ROWS // rows), 1, 1, 1)
        for some in batch.tensor_split(-(-len(batch) // max(1, _ROWS * torch.get_num_threads() // length))):
            x = template.repeat(len(some), 1, 1)
            x[:, prefix:] += self.patches(self._unfolded(some)).unflatten(0, (len(some), -1))
            yield _Part(x.flatten(0, 1), None, len(some), turns)

    def _unfolded(self, pixels: Tensor) -> Tensor:
        """[B, in_chans, H_px, W_px] -> the pixels of each patch in a row, [B*P, in_chans*p*p]."""
        size = self.config.patch_size
        parts = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5)
        return parts.to(self.dtype).reshape(-1, self.config.in_chans * size * size)  # type: ignore[no-any-return]

    def _tables(self, model: VisionTransformer, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Of one image: its tokens before the first block with all patches zero, [1, N, C], and its turns."""
        found = self.grids.get(grid)
        if found is None:
            rope = model.rope(grid)
            empty = torch.zeros(1, grid[0] * grid[1], self.config.embed_dim, dtype=torch.float32, device="cpu")
            template = model.with_prefix(empty, grid)
            found = self.grids[grid] = (template, None if rope is None else self._turns(*rope))
            if len(self.grids) > _GRIDS:
                self.grids.popitem(last=False)
        return found

    def _turns(self, cos: Tensor, sin: Tensor) -> Tensor:
        if not self.fused:
            return torch.complex(cos, sin)
        return torch.cat((cos, sin), 1)


@dataclass
class _Part:
    """Some images of one size on their way through the blocks."""

    x: Tensor  # [T, C] float32: the stream
    more: Tensor | None  # [T, C] to be added to it
    count: int  # images
    turns: Tensor | None  # of an image

    alone: bool = False  # the first rows are the class tokens, and what follows is not needed

    def tokens(self) -> Tensor:
        """[B, N, C], as they are now."""
        x = self.x if self.more is None else self.x + self.more
        return (x[: self.count] if self.alone else x).view(self.count, -1, x.shape[1])

    def class_rows(self, tokens: Tensor) -> Tensor:
        """Those of the class tokens, filled up to as many as the products want."""
        rows = tokens.view(self.count, -1, tokens.shape[1])[:, 0]
        return rows.repeat(-(-_FEW_ROWS // self.count), 1)


class _Block:
    def __init__(self, block: Any, spans: Spans | None, pairs: bool, fused: bool, dtype: torch.dtype) -> None:
        def packed(name: str, weight: Tensor, bias: Tensor | None, *, like: Tensor | None = None) -> Any:
            if spans is None:
                return PackedLinear(weight, bias, dtype)
            low, high, mean = spans[name]
            return QuantisedLinear(weight, bias, *smoothed(low, high, weight if like is None else like), mean, dtype)

        attn, mlp = block.attn, block.mlp
        self.heads, self.passes = attn.num_heads, passes() if fused else None
        self.proj = packed("proj", *_scaled(attn.proj, block.ls1))
        self.qkv = packed("qkv", *_qkv(attn, pairs, self.proj))
        self.gate: Any = None
        if isinstance(mlp, GatedMlp):
            self.down = packed("down", *_scaled(mlp.down, block.ls2))
            whole = mlp.gate_up.weight
            (gate, up), (gate_bias, up_bias) = whole.chunk(2), mlp.gate_up.bias.chunk(2)
            self.gate = packed("up", gate, gate_bias, like=whole)
            self.up = packed("up", *self.down.entering(up, up_bias), like=whole)
        else:
            self.up = packed("up", mlp.fc1.weight, mlp.fc1.bias)
            weight, bias = _scaled(mlp.fc2, block.ls2)
            if spans is None:
                self.down = PackedLinear(weight, bias, dtype)
            else:  # GELU gives it on one grid for all channels, which is part of the product before it
                low, high, mean = spans["down"]
                size = (high.amax() - low.amin()).clamp_min(1e-6) / 255
                zero = int((-low.amin() / size).round().clamp(0, 255))
                grid = size.expand_as(mean)
                self.down = QuantisedLinear(weight, bias, (128 - zero) * grid, grid, mean, dtype)
                self.up.out = (size.item(), zero, torch.uint8)
        self.norms = [_norm(block.norm1, self.qkv), _norm(block.norm2, self.up if self.gate is None else self.gate)]

    def __call__(self, part: _Part, class_only: bool = False) -> None:
        qkv = self.qkv(self._normed(part, 0))
        attend = _attended if self.passes is None else self.passes.attended
        attended = attend(qkv, part.turns, part.count, self.heads, self.proj.takes)
        if class_only:
            part.x, attended, part.alone = part.class_rows(part.x), part.class_rows(attended), True
        part.more = self.proj(self.proj.taken(attended))
        h = self._normed(part, 1)
        wide = self.up(h, "gelu") if self.gate is None else self.up.times(h, self.gate(h, "swish"))
        part.more = self.down(self.down.taken(wide))

    def _normed(self, part: _Part, number: int) -> Tensor:
        """What the next linear takes, after what was computed has been added to the stream."""
        linear = (self.qkv, self.up if self.gate is None else self.gate)[number]
        weight, bias, eps = self.norms[number]
        if self.passes is not None:
            return self.passes.normed(part.x, part.more, weight, bias, eps, linear.takes)  # type: ignore[no-any-return]
        if part.more is not None:
            part.x += part.more
        return linear.taken(torch.layer_norm(part.x, weight.shape, weight, bias, eps))  # type: ignore[no-any-return]


def _attended(qkv: Tensor, turns: Tensor | None, count: int, heads: int, dtype: torch.dtype) -> Tensor:
    """`passes().attended` by operators of torch, and not yet in the dtype that is asked for."""
    length = len(qkv) // count
    parts = qkv.view(count, length, 3, heads, -1).permute(2, 0, 3, 1, 4)  # [3, B, H, N, D]
    if turns is None:
        q, k, v = parts.contiguous().flatten(1, 2)
    else:
        pairs = parts[:2].float().view(2, count, heads, length, -1, 2)
        turned = torch.empty(pairs.shape, dtype=torch.float32, device="cpu")
        torch.mul(torch.view_as_complex(pairs), turns, out=torch.view_as_complex(turned))
        q, k = turned.view(2, count * heads, length, -1).to(qkv.dtype)
        v = parts[2].contiguous().flatten(0, 1)
    few = length**2 <= _SCORES
    if few and qkv.dtype == torch.bfloat16:  # torch's own product of matrices is oneDNN's then
        each = _SCORES // length**2
        some = zip(q.split(each), k.mT.split(each), v.split(each), strict=True)
        found = _joined([torch.bmm(torch.bmm(a, b).softmax(-1), c) for a, b, c in some])
        return found.view(count, heads, length, -1).transpose(1, 2).reshape(count * length, -1)
    alone = [
        _joined([_PRODUCT(_PRODUCT(rows, b, *_REST).softmax(-1), c, *_REST) for rows in ([a] if few else _even(a))])
        for a, b, c in zip(q.unbind(), k.unbind(), v.mT.unbind(), strict=True)
    ]
    return _joined([torch.cat(alone[i : i + heads], -1) for i in range(0, len(alone), heads)])


def _even(q: Tensor) -> Sequence[Tensor]:
    return q.tensor_split(-(-(len(q) ** 2) // _SCORES))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _norm(norm: Any, linear: Any) -> tuple[Any, ...]:
    """Arguments of a layer norm that gives what a linear takes."""
    weight, bias = linear.entering(norm.weight.detach(), norm.bias.detach())
    return weight.clone(), bias.clone(), norm.eps


def _qkv(attn: Any, pairs: bool, proj: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with the softmax scale in q, pairs side by side where they turn, and v as `proj` takes it."""
    weight, bias = attn.qkv.weight, attn.qkv.bias
    if isinstance(attn.qkv, MaskedKeyLinear):
        bias = attn.qkv.masked_bias

    def arranged(t: Tensor) -> Tensor:
        q, k = t.chunk(3)[:2]
        parts = [q * (len(q) // attn.num_heads) ** -0.5, k]
        if pairs:
            parts = [part.unflatten(0, (attn.num_heads, 2, -1)).transpose(1, 2).flatten(0, 2) for part in parts]
        return torch.cat(parts)

    v, v_bias = proj.entering(weight.chunk(3)[2], None if bias is None else bias.chunk(3)[2])
    if bias is None and v_bias is not None:
        bias = torch.zeros_like(weight[:, 0])
    return torch.cat((arranged(weight), v)), None if bias is None else torch.cat((arranged(bias), v_bias))


def _scaled(linear: Any, residual: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with LayerScale in them."""
    weight, bias, gamma = linear.weight, linear.bias, residual.gamma
    return (weight, bias) if gamma is None else (weight * gamma[:, None], None if bias is None else bias * gamma)


# --- 8 bits --------------------------------------------------------------------------------------------------------


class _Watched:
    """A linear that remembers what goes in."""

    def __init__(self, linear: PackedLinear) -> None:
        self.linear, self.taken, self.takes = linear, linear.taken, linear.takes
        self.seen: list[Tensor] = []  # [3, K] of each part: least, largest, sum
        self.count = 0

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        return self.linear(self._seen(x), *rest)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        return self.linear.times(self._seen(x), other)

    def _seen(self, x: Tensor) -> Tensor:
        self.seen.append(torch.stack((x.amin(0), x.amax(0), x.sum(0))))
        self.count += len(x)
        return x

    @property
    def span(self) -> tuple[Tensor, Tensor, Tensor]:
        low, high, total = torch.stack(self.seen, dim=1)
        return low.amin(0), high.amax(0), total.sum(0) / self.count


def spans_of(
    model: VisionTransformer,
    pixels: Sequence[Tensor],  # [B_i, 3, H_i, W_i] float32, normalised: one tensor per size
) -> list[Spans]:
    """What the linears of each block are given for some images."""
    plan, spans = CpuPlan(model, torch.float32), list[Spans]()
    for block in plan.blocks:
        for name in ("qkv", "proj", "up", "down"):
            setattr(block, name, _Watched(getattr(block, name)))
    plan(model, pixels)
    for block in plan.blocks:
        found: Spans = {name: getattr(block, name).span for name in ("qkv", "proj", "up", "down")}
        if block.gate is not None:  # a product of two has no middle that could be part of a bias
            low, high, mean = found["down"]
            reach = torch.maximum(high, -low)
            found["down"] = (-reach, reach, mean)
        spans.append(found)
    return spans
