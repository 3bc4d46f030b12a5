"""The forward pass of a model with weights of its own, in the form that a CPU computes with fastest.

The weights are packed once (see `packed`), LayerScale is multiplied into them, the residual is added within the
product, and q and k are turned by one complex product, for which the channels of a pair lie side by side.  What each
step brings is in tests/benchmarks/records/plan_steps.md.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .layers import GatedMlp, MaskedKeyLinear
from .packed import PackedLinear, QuantisedLinear, smoothed
from .vit import BackboneOutput, LayerOutput, VisionTransformer

__all__ = ["Plan", "Spans", "spans_of"]

Group: TypeAlias = tuple[int, int, Tensor | None]  # pictures, tokens of each, their turns [N, D/2] complex
Spans: TypeAlias = dict[str, tuple[Tensor, Tensor, Tensor]]  # least, largest and mean input of each channel of a linear
_ROWS = 512  # of the FFN at a time: its wide layer stays in the cache
_SCORES = 1 << 20  # of q k^T at a time: for the cache too, and so that large pictures need no more memory
_FEW_ROWS = 16  # a single row goes to another kernel, which rounds differently
_GRIDS = 32  # sizes of pictures whose tables are kept
# glibc gives freed memory back to the system and fetches it again page by page, 8 to 10 % of the time of float32, until
# it has seen one such block freed.  This is just below the largest size that it learns from.
_KEPT_BYTES = 31 << 20
# x W^T with W as it is: torch's own products in float32 have the fault that `packed` speaks of
_PRODUCT: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_REST: tuple[Any, ...] = (None, "none", [], "")


class Plan:
    """What a model computes of float32 pixels, without gradients; a second copy of its weights.

    `dtype`: float32 or bfloat16, of the products; the stream, norms and RoPE are float32.
    `spans`: of every block, see `spans_of`; with them the linears of the blocks are in 8 bits.
    """

    def __init__(self, model: VisionTransformer, dtype: torch.dtype, spans: Sequence[Spans] | None = None) -> None:
        self.config, self.dtype = model.config, dtype
        torch.empty(_KEPT_BYTES, dtype=torch.uint8)
        embed: Any = model.patch_embed.proj
        self.patches = PackedLinear(embed.weight.flatten(1), embed.bias, self.dtype)
        each: Sequence[Spans | None] = [None] * len(model.blocks) if spans is None else spans
        turned = model.rope_periods is not None
        self.blocks = [_Block(block, turned, dtype, own) for block, own in zip(model.blocks, each, strict=True)]
        self.grids: OrderedDict[tuple[int, int], tuple[Tensor, Tensor | None]] = OrderedDict()

    def __call__(
        self,
        model: VisionTransformer,  # whose plan this is
        pixels: Sequence[Tensor],  # [B_i, 3, H_i, W_i] float32, normalised: one tensor per size
        indices: Sequence[int] = (),  # blocks to keep
    ) -> list[BackboneOutput]:
        """What the model gives for each tensor, with the blocks asked for as its layers."""
        streams, groups = [], list[Group]()
        for batch in pixels:
            template, turns = self._tables(model, model.grid_of(batch))
            if (rows := len(batch) * (template.shape[1] - self.config.num_prefix)) < _FEW_ROWS:
                batch = batch.repeat(-(-_FEW_ROWS // rows), 1, 1, 1)
            x = template.repeat(len(batch), 1, 1)
            x[:, self.config.num_prefix :] += self.patches(self._unfolded(batch)).unflatten(0, (len(batch), -1))
            streams.append(x.flatten(0, 1))
            groups.append((len(batch), x.shape[1], turns))
        x, taken = _joined(streams), {}
        for i, block in enumerate(self.blocks):
            x = block(x, groups)
            if i in indices:
                taken[i] = x

        def named(stream: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
            """Of each tensor, without the pictures that were repeated."""
            parts = zip(_split(stream, groups), groups, pixels, strict=True)
            return [model.split(model.normed(part.unflatten(0, group[:2])[: len(b)])) for part, group, b in parts]

        layers = {i: named(stream) for i, stream in taken.items()}
        return [
            BackboneOutput(*tokens, tuple(LayerOutput(*layers[i][number]) for i in indices))
            for number, tokens in enumerate(named(x))
        ]

    def _unfolded(self, pixels: Tensor) -> Tensor:
        """[B, 3, H_px, W_px] -> the pixels of each patch in a row, [B*P, 3*p*p]."""
        size = self.config.patch_size
        parts = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5)
        return parts.to(self.dtype).reshape(-1, 3 * size * size)  # type: ignore[no-any-return]

    def _tables(self, model: VisionTransformer, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Of one picture: its tokens before the first block with all patches zero, [1, N, C], and its turns."""
        found = self.grids.get(grid)
        if found is None:
            rope = model.rope(grid)
            template = model.with_prefix(torch.zeros(1, grid[0] * grid[1], self.config.embed_dim), grid)
            found = self.grids[grid] = (template, None if rope is None else torch.complex(*rope))
            if len(self.grids) > _GRIDS:
                self.grids.popitem(last=False)
        return found


class _Block:
    def __init__(self, block: Any, turned: bool, dtype: torch.dtype, spans: Spans | None) -> None:
        def packed(name: str, weight: Tensor, bias: Tensor | None, *, like: Tensor | None = None) -> Any:
            if spans is None:
                return PackedLinear(weight, bias, dtype)
            low, high, mean = spans[name]
            return QuantisedLinear(weight, bias, *smoothed(low, high, weight if like is None else like), mean, dtype)

        attn, mlp = block.attn, block.mlp
        self.heads = attn.num_heads
        self.proj = packed("proj", *_scaled(attn.proj, block.ls1))
        self.qkv = packed("qkv", *_qkv(attn, turned, self.proj))
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

    def __call__(self, x: Tensor, groups: Sequence[Group]) -> Tensor:
        """[T, C] -> [T, C]."""
        qkv = self.qkv(self.qkv.taken(torch.layer_norm(x, *self.norms[0])))
        heads = [self._attended(part, *group) for part, group in zip(_split(qkv, groups), groups, strict=True)]
        x = self.proj.onto(x, self.proj.taken(_joined(heads)))
        return _joined([self._ffn(part) for part in x.tensor_split(-(-len(x) // _ROWS))])

    def _ffn(self, x: Tensor) -> Tensor:
        h = self.up.taken(torch.layer_norm(x, *self.norms[1]))
        wide = self.up(h, "gelu") if self.gate is None else self.up.times(h, self.gate(h, "swish"))
        return self.down.onto(x, self.down.taken(wide))  # type: ignore[no-any-return]

    def _attended(self, qkv: Tensor, count: int, length: int, turns: Tensor | None) -> Tensor:
        """[B*N, 3*C] -> [B*N, C]."""
        parts = qkv.view(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [3, B, H, N, D]
        if turns is None:
            q, k, v = parts.contiguous().flatten(1, 2)
        else:
            pairs = parts[:2].float().view(2, count, self.heads, length, -1, 2)
            turned = torch.empty(pairs.shape, dtype=torch.float32)
            torch.mul(torch.view_as_complex(pairs), turns, out=torch.view_as_complex(turned))
            q, k = turned.view(2, count * self.heads, length, -1).to(qkv.dtype)
            v = parts[2].contiguous().flatten(0, 1)
        few = length**2 <= _SCORES
        if few and qkv.dtype == torch.bfloat16:  # torch's own product of matrices is oneDNN's then
            each = _SCORES // length**2
            heads = zip(q.split(each), k.mT.split(each), v.split(each), strict=True)
            found = _joined([torch.bmm(torch.bmm(a, b).softmax(-1), c) for a, b, c in heads])
            return found.view(count, self.heads, length, -1).transpose(1, 2).reshape(count * length, -1)
        alone = [
            _joined([_PRODUCT(_PRODUCT(some, b, *_REST).softmax(-1), c, *_REST) for some in ([a] if few else _even(a))])
            for a, b, c in zip(q.unbind(), k.unbind(), v.mT.unbind(), strict=True)
        ]
        return _joined([torch.cat(alone[i : i + self.heads], -1) for i in range(0, len(alone), self.heads)])


def _even(q: Tensor) -> Sequence[Tensor]:
    return q.tensor_split(-(-(len(q) ** 2) // _SCORES))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _split(tokens: Tensor, groups: Sequence[Group]) -> Sequence[Tensor]:
    return tokens.split([count * length for count, length, _ in groups])  # type: ignore[no-any-return]


def _norm(norm: Any, linear: Any) -> tuple[Any, ...]:
    """Arguments of a layer norm that gives what a linear takes."""
    weight, bias = linear.entering(norm.weight.detach(), norm.bias.detach())
    return norm.normalized_shape, weight.clone(), bias.clone(), norm.eps


def _qkv(attn: Any, turned: bool, proj: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with the softmax scale in q, pairs side by side where they turn, and v as `proj` takes it."""
    weight, bias = attn.qkv.weight, attn.qkv.bias
    if isinstance(attn.qkv, MaskedKeyLinear):
        query, key, value = bias.chunk(3)
        bias = torch.cat((query, torch.zeros_like(key), value))

    def arranged(t: Tensor) -> Tensor:
        q, k = t.chunk(3)[:2]
        parts = [part.unflatten(0, (attn.num_heads, 2, -1)) for part in (q * (len(q) // attn.num_heads) ** -0.5, k)]
        return torch.cat([(part.transpose(1, 2) if turned else part).flatten(0, 2) for part in parts])

    v, v_bias = proj.entering(weight.chunk(3)[2], None if bias is None else bias.chunk(3)[2])
    if bias is None and v_bias is not None:
        bias = torch.zeros(len(weight))
    return torch.cat((arranged(weight), v)), None if bias is None else torch.cat((arranged(bias), v_bias))


def _scaled(linear: Any, residual: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with LayerScale in them."""
    weight, bias, gamma = linear.weight, linear.bias, residual.gamma
    return (weight, bias) if gamma is None else (weight * gamma[:, None], None if bias is None else bias * gamma)


# --- 8 bits --------------------------------------------------------------------------------------------------------


class _Watched:
    """A linear that remembers what goes in."""

    def __init__(self, linear: PackedLinear) -> None:
        self.linear, self.taken = linear, linear.taken
        self.seen: list[Tensor] = []  # [3, K] of each part: least, largest, sum
        self.count = 0

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        return self.linear(self._seen(x), *rest)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        return self.linear.times(self._seen(x), other)

    def onto(self, stream: Tensor, x: Tensor) -> Tensor:
        return self.linear.onto(stream, self._seen(x))

    def _seen(self, x: Tensor) -> Tensor:
        self.seen.append(torch.stack((x.amin(0), x.amax(0), x.sum(0))))
        self.count += len(x)
        return x

    @property
    def span(self) -> tuple[Tensor, Tensor, Tensor]:
        low, high, total = torch.stack(self.seen, dim=1)
        return low.amin(0), high.amax(0), total.sum(0) / self.count


def spans_of(model: VisionTransformer, pixels: Tensor) -> list[Spans]:
    """What the linears of each block are given for some pictures."""
    plan, spans = Plan(model, torch.float32), list[Spans]()
    for block in plan.blocks:
        for name in ("qkv", "proj", "up", "down"):
            setattr(block, name, _Watched(getattr(block, name)))
    plan(model, [pixels])
    for block in plan.blocks:
        found: Spans = {name: getattr(block, name).span for name in ("qkv", "proj", "up", "down")}
        if block.gate is not None:  # a product of two has no middle that could be part of a bias
            low, high, mean = found["down"]
            reach = torch.maximum(high, -low)
            found["down"] = (-reach, reach, mean)
        spans.append(found)
    return spans
