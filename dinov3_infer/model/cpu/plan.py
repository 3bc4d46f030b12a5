"""The forward pass of a vision transformer in the form that a CPU computes fastest, with its own packed weights.

Weights are packed once (see `linear`), with LayerScale and the softmax scale folded in, and a few images at a time go
through a block.  One pass of compiled C does the work between two products (see `compiled`).  Without it one complex
product rotates q and k, for which the channels of a pair are adjacent, and packed products compute attention.  The gain
of each step is in tests/benchmarks/records/plan_steps.md.
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

Spans: TypeAlias = dict[str, tuple[Tensor, Tensor, Tensor]]  # linear -> smallest, largest and mean input, [K] each
_ROWS = 512  # rows per thread at a time, so that intermediate values stay in the cache
_SCORES = 1 << 20  # elements of q k^T at a time: fits the cache, and bounds the memory of large images
_FEW_ROWS = 16  # fewer rows would use another kernel with other rounding
_GRIDS = 32  # image sizes whose tables are cached
# x W^T with W unpacked: torch's own float32 products are slow, see `linear`
_PRODUCT: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_REST: tuple[Any, ...] = (None, "none", [], "")


class CpuPlan:
    """The computation of a model on float32 pixels, without gradients; holds a second copy of the weights.

    `dtype`: float32 or bfloat16, for matrix products; the stream, norms and RoPE are float32.
    `spans`: input ranges of every block, see `spans_of`; with them the linear layers of the blocks use 8 bits.
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
        model: VisionTransformer,  # the model of this plan
        pixels: Sequence[Tensor],  # [B_i, 3, H_i, W_i] float32, normalised: one tensor per size
        indices: Sequence[int] = (),  # blocks to keep
        scale: Scale | None = None,  # unused: a CPU gets no uint8 pixels
        class_only: bool = False,  # only class tokens are needed, and no layers
    ) -> list[BackboneOutput]:
        """The output of the model for each tensor, with the blocks `indices` as its layers.

        With `class_only` registers and patches have no rows, and the last block computes class tokens alone.  Their
        bits are the same, since no row of a product depends on another.
        """
        parts = [list(self._entered(model, batch)) for batch in pixels]
        kept: dict[int, list[list[Tensor]]] = {}
        for i, block in enumerate(self.blocks):
            for part in chain.from_iterable(parts):
                block(part, class_only and i + 1 == len(self.blocks))
            if i in indices:
                kept[i] = [[part.tokens() for part in own] for own in parts]

        def named(streams: list[Tensor], count: int) -> tuple[Tensor, Tensor, Tensor]:
            """Drop repeated images, and name the tokens."""
            return model.split(model.normed(torch.cat(streams)[:count]))

        return [
            BackboneOutput(
                *named([part.tokens() for part in own], len(batch)),
                tuple(LayerOutput(*named(kept[i][number], len(batch))) for i in indices),
            )
            for number, (own, batch) in enumerate(zip(parts, pixels, strict=True))
        ]

    def _entered(self, model: VisionTransformer, batch: Tensor) -> Iterator["_Part"]:
        """Yield the tokens before the first block, as many images at a time as fit the caches."""
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
        """The tokens of one image before the first block with all patches zero, [1, N, C], and its rotations."""
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
    more: Tensor | None  # [T, C], not yet added to the stream
    count: int  # images
    turns: Tensor | None  # rotations of one image

    alone: bool = False  # True: the first rows are the class tokens, and the others are not needed

    def tokens(self) -> Tensor:
        """The stream as [B, N, C]."""
        x = self.x if self.more is None else self.x + self.more
        return (x[: self.count] if self.alone else x).view(self.count, -1, x.shape[1])

    def class_rows(self, tokens: Tensor) -> Tensor:
        """Rows of the class tokens, repeated to the number that the products need."""
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
            else:  # the product before it applies GELU and quantises to one grid for all channels
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
        """Add the pending result to the stream, and return the normed input of the next linear layer."""
        linear = (self.qkv, self.up if self.gate is None else self.gate)[number]
        weight, bias, eps = self.norms[number]
        if self.passes is not None:
            return self.passes.normed(part.x, part.more, weight, bias, eps, linear.takes)  # type: ignore[no-any-return]
        if part.more is not None:
            part.x += part.more
        return linear.taken(torch.layer_norm(part.x, weight.shape, weight, bias, eps))  # type: ignore[no-any-return]


def _attended(qkv: Tensor, turns: Tensor | None, count: int, heads: int, dtype: torch.dtype) -> Tensor:
    """`passes().attended` with operators of torch; the result is not yet in the requested dtype."""
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
    if few and qkv.dtype == torch.bfloat16:  # torch's bfloat16 products use oneDNN
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
    """Arguments of a layer norm whose result `linear.taken` accepts."""
    weight, bias = linear.entering(norm.weight.detach(), norm.bias.detach())
    return weight.clone(), bias.clone(), norm.eps


def _qkv(attn: Any, pairs: bool, proj: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with the softmax scale in q, adjacent channel pairs for rotation, and v adapted to `proj`."""
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
    """Weight and bias with LayerScale folded in."""
    weight, bias, gamma = linear.weight, linear.bias, residual.gamma
    return (weight, bias) if gamma is None else (weight * gamma[:, None], None if bias is None else bias * gamma)


class _Watched:
    """A linear layer that records the range of its inputs."""

    def __init__(self, linear: PackedLinear) -> None:
        self.linear, self.taken, self.takes = linear, linear.taken, linear.takes
        self.seen: list[Tensor] = []  # [3, K] per part: smallest, largest, sum
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
    """The input ranges of the linear layers of each block, measured on some images."""
    plan, spans = CpuPlan(model, torch.float32), list[Spans]()
    for block in plan.blocks:
        for name in ("qkv", "proj", "up", "down"):
            setattr(block, name, _Watched(getattr(block, name)))
    plan(model, pixels)
    for block in plan.blocks:
        found: Spans = {name: getattr(block, name).span for name in ("qkv", "proj", "up", "down")}
        if block.gate is not None:  # the middle of a product of two cannot be folded into a bias
            low, high, mean = found["down"]
            reach = torch.maximum(high, -low)
            found["down"] = (-reach, reach, mean)
        spans.append(found)
    return spans
