"""Parts at the level of the operator: forward, forward and backward, and images of many sizes.

A part is a list of plans: the name of a cell, and a function that builds it before it is measured.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import Cell, copies, imported, relative_error
from peers import OP, Attention, Inputs, auto, contestants, differentiable, fused, rotation_and_sdpa, table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dinov3_infer.cli.bench.contest import Settings
from dinov3_infer.model.attention import eager_attention, sdpa_attention

Plan = tuple[dict[str, Any], Callable[[], Cell]]
TOKENS = 16384  # of a batch, about: enough to fill a GPU
HEADS = {64: 16, 128: 32}  # those of ViT-L and ViT-7B
SIDES = (16, 32, 14, 64, 48, 128)  # patches; 261, 1029, 201, 4101, 2309, 16389 tokens, the most wanted first
LIMIT = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-4}  # relative error; bfloat16 tables alone cost 3e-3
MIX = {16: 24, 32: 12, 64: 4}  # sides of 256, 512 and 1024 pixels: 60, 30 and 10 percent of the images


def shapes(settings: Settings, sides: tuple[int, ...]) -> list[dict[str, Any]]:
    """bfloat16 at both widths, then float16 at the two commonest sizes."""
    if not settings.cuda:
        return [dict(tokens=21, side=4, width=64, heads=2, batch=2, dtype="bfloat16")]
    rows = [(side, width, "bfloat16") for width in HEADS for side in sides]
    rows += [(side, 64, "float16") for side in sides[:2]]
    return [
        dict(
            tokens=(n := side * side + 5), side=side, width=width, heads=HEADS[width], batch=max(1, TOKENS // n),
            dtype=dtype,
        )
        for side, width, dtype in rows
    ]  # fmt: skip


def forward_part(settings: Settings, short: bool = False) -> list[Plan]:
    """`short`: heads of 64 channels at four lengths, without contestants that have to be compiled."""
    if short:
        found = [s for s in shapes(settings, SIDES[:4]) if s["width"] == 64 and s["dtype"] == "bfloat16"]
        return [(shape, partial(_forward_cell, shape, settings, False)) for shape in found]
    return [(shape, partial(_forward_cell, shape, settings)) for shape in shapes(settings, SIDES)]


def backward_part(settings: Settings) -> list[Plan]:
    return [(shape, partial(_backward_cell, shape, settings)) for shape in shapes(settings, SIDES[:-1])]


def mixed_part(settings: Settings) -> list[Plan]:
    mix = MIX if settings.cuda else {2: 3, 4: 1}
    shape = dict(width=64, heads=16 if settings.cuda else 2, dtype="bfloat16", images=sum(mix.values()))
    shape |= dict(tokens=sum(count * (side * side + 5) for side, count in mix.items()))
    return [(shape, partial(_mixed_cell, shape, mix, settings))]


# --- one size ------------------------------------------------------------------------------------------------------


def random_inputs(shape: dict[str, Any], settings: Settings) -> list[Inputs]:
    cos, sin = table((shape["side"], shape["side"]), shape["width"], settings.device)
    size = (shape["batch"], shape["tokens"], 3, shape["heads"], shape["width"])
    kind: Any = dict(device=settings.device, dtype=getattr(torch, shape["dtype"]))
    count = copies(torch.Size(size).numel() * torch.empty((), **kind).element_size()) if settings.cuda else 2
    return [Inputs(torch.randn(size, **kind), cos, sin) for _ in range(count)]


def flops_of(shape: dict[str, Any]) -> float:
    """4 N^2 H D for each image."""
    return 4.0 * shape["tokens"] ** 2 * shape["heads"] * shape["width"] * shape["batch"]


def corners(x: Tensor) -> Tensor:
    """First and last image, first and last head of [B, N, ..., H, D]."""
    return x[[0, -1]][..., [0, -1], :]


def _forward_cell(shape: dict[str, Any], settings: Settings, compiling: bool = True) -> Cell:
    inputs = random_inputs(shape, settings)
    exact = eager_attention(corners(inputs[0].qkv).double(), inputs[0].cos, inputs[0].sin)
    heads = (shape["heads"], shape["width"])

    def judge(out: Tensor) -> float:
        whole = bool(out.isfinite().all())
        return relative_error(corners(out.unflatten(-1, heads)).flatten(2), exact) if whole else float("inf")

    calls = contestants(settings.device)
    found = {n: _without_gradient(call) for n, call in calls.items() if compiling or not n.endswith("compiled")}
    if shape["tokens"] > 5000:  # its scores would fill the GPU
        del found["rotation + math"]
    return Cell(shape, inputs, found, judge, LIMIT[shape["dtype"]], flops_of(shape))


def _without_gradient(call: Attention) -> Attention:
    def run(x: Inputs) -> Tensor:
        with torch.no_grad():
            return call(x)

    return run


def _backward_cell(shape: dict[str, Any], settings: Settings) -> Cell:
    inputs = random_inputs(shape, settings)
    grad = torch.randn_like(inputs[0].qkv[:, :, 0]).flatten(2)  # of the output
    for x in inputs:
        x.qkv.requires_grad_()
    heads = (shape["heads"], shape["width"])
    first = corners(inputs[0].qkv.detach()).double().requires_grad_()
    out = eager_attention(first, inputs[0].cos, inputs[0].sin)
    (exact,) = torch.autograd.grad(out, first, corners(grad.unflatten(-1, heads)).flatten(2).double())

    def gradient(call: Attention, x: Inputs) -> Tensor:
        return torch.autograd.grad(call(x), x.qkv, grad)[0]

    def judge(found: Tensor) -> float:
        return relative_error(corners(found), exact) if bool(found.isfinite().all()) else float("inf")

    calls = differentiable(settings.device) | {"definition, SDPA": lambda x: sdpa_attention(x.qkv, x.cos, x.sin)}
    found = {name: partial(gradient, call) for name, call in calls.items()}
    return Cell(shape, inputs, found, judge, 2 * LIMIT[shape["dtype"]], 3.5 * flops_of(shape))


# --- many sizes ----------------------------------------------------------------------------------------------------


class Mixed:
    """The same images packed, size by size, and padded to the longest."""

    def __init__(self, shape: dict[str, Any], mix: dict[int, int], settings: Settings) -> None:
        heads, width, device = shape["heads"], shape["width"], settings.device
        kind: Any = dict(device=device, dtype=getattr(torch, shape["dtype"]))
        tables = {side: table((side, side), width, device) for side in mix}
        self.lengths = [side * side + 5 for side, count in mix.items() for _ in range(count)]
        sides = [side for side, count in mix.items() for _ in range(count)]
        ends = torch.tensor([0, *self.lengths]).cumsum(0).to(device, torch.int32)
        cos, sin = (torch.cat([tables[side][i] for side in sides]) for i in (0, 1))
        self.packed = Inputs(torch.randn(sum(self.lengths), 3, heads, width, **kind), cos, sin, ends, max(self.lengths))
        self.groups, start = [], 0
        for side, count in mix.items():
            tokens = count * (side * side + 5)
            part = self.packed.qkv[start : start + tokens].unflatten(0, (count, -1))
            self.groups.append(Inputs(part, *tables[side]))
            start += tokens
        places = torch.arange(self.packed.longest, device=device)
        self.valid = places < torch.tensor(self.lengths, device=device)[:, None]  # [S, L]
        filled = torch.zeros(*self.valid.shape, 3, heads, width, **kind)
        filled[self.valid] = self.packed.qkv
        cos, sin = (torch.zeros(*self.valid.shape, width // 2, device=device) for _ in range(2))
        cos[self.valid], sin[self.valid] = self.packed.cos, self.packed.sin
        self.padded = Inputs(filled.flatten(0, 1), cos.flatten(0, 1), sin.flatten(0, 1))

    def rows(self, out: Any) -> Tensor:
        """[T, H*D], whatever form a contestant gives."""
        if isinstance(out, list):
            return torch.cat([part.flatten(0, 1) for part in out])
        return out[self.valid] if out.ndim == 3 else out


def _padded(x: Mixed) -> Tensor:
    qk = OP.rope_rotate(x.padded.qkv, x.padded.cos, x.padded.sin).unflatten(0, x.valid.shape)
    q, k = qk.transpose(1, 3).unbind(2)
    v = x.padded.qkv.unflatten(0, x.valid.shape)[:, :, 2].transpose(1, 2)
    return scaled_dot_product_attention(q, k, v, attn_mask=x.valid[:, None, None]).transpose(1, 2).flatten(2)


def _by_size(attend: Attention, x: Mixed) -> list[Tensor]:
    return [attend(group) for group in x.groups]


def _varlen(attend: Callable[..., Tensor], x: Mixed) -> Tensor:
    """FlashAttention for packed sequences, as torch has it."""
    q, k = OP.rope_rotate(x.packed.qkv, x.packed.cos, x.packed.sin).unbind(1)
    ends, longest = x.packed.cu_seqlens, x.packed.longest
    return attend(q, k, x.packed.qkv[:, 2], ends, ends, longest, longest).flatten(1)


def _mixed_cell(shape: dict[str, Any], mix: dict[int, int], settings: Settings) -> Cell:
    inputs = [Mixed(shape, mix, settings) for _ in range(2)]
    exact = [eager_attention(corners(g.qkv[:1]).double(), g.cos, g.sin)[0] for g in inputs[0].groups]
    starts = torch.tensor([0, *inputs[0].lengths]).cumsum(0).tolist()
    firsts = [starts[inputs[0].lengths.index(length)] for length in dict.fromkeys(inputs[0].lengths)]

    def judge(out: Any) -> float:
        rows = inputs[0].rows(out).unflatten(-1, (shape["heads"], shape["width"]))[:, [0, -1]].flatten(1)
        parts = [rows[first : first + len(part)] for first, part in zip(firsts, exact, strict=True)]
        return relative_error(torch.cat(parts), torch.cat(exact))

    found: dict[str, Callable[[Mixed], Any]] = {
        "packed": lambda x: fused(x.packed),
        "padded, rotation + SDPA": _padded,
        "by size, fused": partial(_by_size, fused),
        "by size, auto": partial(_by_size, auto),
        "by size, rotation + SDPA": partial(_by_size, rotation_and_sdpa),
    }
    if (attend := imported("torch.nn.attention.varlen", "varlen_attn")) is not None:
        found["packed, rotation + varlen flash"] = partial(_varlen, attend)
    flops = 4.0 * shape["heads"] * shape["width"] * sum(n * n for n in inputs[0].lengths)
    return Cell(shape, inputs, found, judge, LIMIT[shape["dtype"]], flops)
