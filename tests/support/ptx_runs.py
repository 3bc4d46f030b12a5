"""Runs each kernel in the PTX executor with the arguments of its launcher, and measures the error."""

import collections
import io
import re
from contextlib import redirect_stdout
from functools import cache
from typing import Any

import kernel_cases as kc  # first: it turns the interpreter off
import numpy as np
import ptx
import torch
import triton
from kernel_cases import FP32, Case

from dinov3_infer.model.attention import sdpa_attention
from dinov3_infer.model.fused import OPERATORS
from dinov3_infer.model.rope import rope_periods, rope_table

__all__ = ["SYNCHRONISES", "Executor", "Image", "between"]

LOG2_E = 1.4426950408889634
SYNCHRONISES = re.compile(
    r"\s*(?:@%p\d+ )?(bar\.sync|fence\.proxy|cp\.async\.wait_group|cp\.async\.commit_group|wgmma\.wait_group)"
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@cache
def built(case: Case) -> Any:
    with redirect_stdout(io.StringIO()):
        return kc.built(case)


class Executor:
    """Compiles a kernel and executes all of its programs; `cut` is a line of PTX to remove."""

    def __init__(self, kind: str = "", cut: int = -1) -> None:
        self.kind, self.cut = kind, cut  # the kernel from which the line is removed
        self.lines: dict[str, list[str]] = {}
        self.counts: dict[str, collections.Counter[str]] = {}  # see `ptx.Run.counts`
        self.compiled: dict[str, Any] = {}

    def __call__(self, case: Case, memory: ptx.Memory, arguments: list[Any], programs: int) -> None:
        compiled = self.compiled[case.kind] = built(case)
        lines = self.lines[case.kind] = compiled.asm["ptx"].splitlines()
        cut = self.cut if case.kind == self.kind else -1
        text = "\n".join(line for number, line in enumerate(lines) if number != cut)
        program = ptx.Program(text, compiled.metadata.shared, case.config.warps * 32)
        counts = self.counts[case.kind] = collections.Counter()
        for number in range(programs):
            counts.update(program.run(arguments, memory, number).counts)


def bits(t: Any) -> np.ndarray:
    t = t.contiguous()
    return t.view(torch.int16).numpy() if t.element_size() == 2 else t.numpy()


def nans(*shape: int, dtype: torch.dtype) -> np.ndarray:
    return bits(torch.full(shape, float("nan"), dtype=dtype)).copy()


def error(found: Any, expected: Any) -> float:
    return float((found.double() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


class Image:
    """The attention of one image: inputs and expected result."""

    def __init__(self, grid: tuple[int, int], width: int, heads: int, dtype: torch.dtype) -> None:
        self.n, self.d, self.h, self.dtype, self.scale = grid[0] * grid[1] + 5, width, heads, dtype, width**-0.5
        self.qkv = torch.randn(1, self.n, 3, heads, width).to(dtype)
        self.grad = torch.randn(1, self.n, heads * width).to(dtype)
        self.table = rope_table(grid, rope_periods(width), 5)
        x, y = self.qkv.double().requires_grad_(), self.qkv.clone().requires_grad_()
        exact, torchs = (sdpa_attention(t, *self.table) for t in (x, y))
        exact.backward(self.grad.double())
        torchs.backward(self.grad)
        self.exact, self.torchs = (exact.detach(), x.grad), (torchs.detach(), y.grad)

    def judged(self, found: Any, gradient: bool = False, parts: slice = slice(3)) -> tuple[float, float]:
        """The error of a result, or of parts of a gradient of qkv, and the error of torch in the same dtype."""
        some = [t[:, :, parts] if gradient else t for t in (found, self.torchs[gradient], self.exact[gradient])]
        return error(some[0], some[2]), error(some[1], some[2])

    def forward(self, run: Executor, chip: str, config: kc.Config, tables: torch.dtype = FP32) -> tuple[Any, Any]:
        """Result and sums of weights, with one program per head or per tile."""
        out, lse = nans(1, self.n, self.h * self.d, dtype=self.dtype), nans(1, self.h, self.n, dtype=FP32)
        m, strides, kind = ptx.Memory(), self.qkv.stride()[:4], "short" if config.whole else "forward"
        tensors = [*(m.put(bits(t)) for t in (self.qkv, *(t.to(tables) for t in self.table))), m.put(out), m.put(lse)]
        rest = self.n % config.block_n
        tail = max(16, triton.next_power_of_2(rest)) if rest else 0
        case = Case(kind, chip, self.d, self.dtype, config, tail=tail, tables=tables, tokens=self.n)
        counts = [self.n] if config.whole else [self.n, self.n]
        programs = self.h if config.whole else triton.cdiv(self.n, config.block_m) * self.h
        run(case, m, [*tensors, *counts, self.h, *strides, self.scale * LOG2_E], programs)
        return torch.from_numpy(out).view(self.dtype), lse

    def backward(
        self, run: Executor, chip: str, rows: dict[str, kc.Config], out: Any, lse: Any, tables: torch.dtype = FP32
    ) -> Any:
        """The gradient of qkv from four kernels; NaN in rows that the last two do not write."""
        n, d, h, m = self.n, self.d, self.h, ptx.Memory()
        delta, qk = nans(1, h, n, dtype=FP32), nans(1, n, 2, h, d, dtype=self.dtype)
        dqkv = nans(1, n, 3, h, d, dtype=self.dtype)
        g, o, q = (m.put(bits(t)) for t in (self.grad, out, self.qkv))
        c, s = (m.put(bits(t.to(tables))) for t in self.table)
        de, k, ls, dq = m.put(delta), m.put(qk), m.put(lse), m.put(dqkv)
        v, stride = q + 2 * h * d * self.qkv.element_size(), self.qkv.stride()
        strides = [n * 2 * h * d, 2 * h * d, h * d, d, stride[0], stride[1], stride[3]]
        both = [k, v, c, s, g, ls, de, dq, n, n, h, *strides, self.scale, self.scale * LOG2_E]
        rows = dict(delta=kc.ROTATION, rotate=kc.ROTATION) | rows
        given = dict(delta=[g, o, de, n, h], rotate=[q, c, s, k, n, h, *stride[:4]])
        for kind, config in rows.items():
            tile = config.block_n if kind == "key_value" else config.block_m
            programs = triton.cdiv(n, tile) * h * (2 if kind == "rotate" else 1)
            run(Case(kind, chip, d, self.dtype, config, tables=tables), m, given.get(kind, both), programs)
        return torch.from_numpy(dqkv).view(self.dtype)


def between(run: Executor, case: Case, rows: int = 7) -> list[tuple[float, float]]:
    """Errors of a kernel between products, and of its definition in the same dtypes, on fixed inputs."""
    torch.manual_seed(0)
    m, config, dtype = ptx.Memory(), case.config, case.out or case.dtype
    if case.kind == "unfold":
        images = torch.randint(0, 256, (2, 3, 2 * case.width, rows * case.width), dtype=torch.uint8)
        out = nans(2, 2 * rows, 3 * case.width**2, dtype=dtype)
        tensors = [m.put(bits(images)), m.put(out)]
        programs = 2 * triton.cdiv(2 * rows, config.block_m)
        run(case, m, [*tensors, 2 * rows, rows, *images.stride()[:3], *MEAN, *STD], programs)
        given: tuple[Any, ...] = (images, MEAN, STD, case.width)
        exact = (OPERATORS["unfold"][1](images.double() / 255.0, MEAN, STD, case.width, torch.float64),)
        found, torchs = (out,), (OPERATORS["unfold"][1](*given, dtype),)
    elif case.kind == "swiglu":
        gate_up = (torch.randn(rows, 2 * case.width) * 4).to(dtype)
        out = nans(rows, case.width, dtype=dtype)
        programs = triton.cdiv(rows, config.block_m) * triton.cdiv(case.width, config.block_n)
        run(case, m, [m.put(bits(gate_up)), m.put(out), rows, case.width], programs)
        exact, torchs = ((OPERATORS["swiglu"][1](x),) for x in (gate_up.double(), gate_up))
        found = (out,)
    elif case.kind.endswith("_backward"):
        return _norm_backward(run, case, m, rows)
    else:
        x, branch = torch.randn(rows, case.width) * 3, torch.randn(rows, case.width).to(case.dtype)
        scale, weight, bias = torch.randn(3, case.width)
        total, out = nans(rows, case.width, dtype=FP32), nans(rows, case.width, dtype=dtype)
        alone = case.kind == "norm"
        tensors = [m.put(bits(t)) for t in ((x, weight, bias) if alone else (x, branch, scale, weight, bias))]
        arguments = [*tensors, m.put(total), m.put(out), rows, 1e-5]
        run(case, m, arguments, triton.cdiv(rows, config.block_m))
        steps = OPERATORS["layer_norm" if alone else "residual_norm"][1]
        rest = (weight, bias, 1e-5) if alone else (scale, weight, bias, 1e-5)
        exact, torchs = (
            steps(*(t.to(wide) for t in ((x,) if alone else (x, branch))), *rest, wide or dtype)
            for wide in (torch.float64, None)
        )
        exact, torchs = ((e,) if alone else e for e in (exact, torchs))
        found = (out,) if alone else (total, out)
    return _errors(found, exact, torchs)


def _errors(found: Any, exact: Any, torchs: Any) -> list[tuple[float, float]]:
    pairs = zip(found, exact, torchs, strict=True)
    return [(error(torch.from_numpy(f).view(t.dtype), e), error(t, e)) for f, e, t in pairs]


def _norm_backward(run: Executor, case: Case, m: ptx.Memory, rows: int) -> list[tuple[float, float]]:
    """The gradient of a norm by two programs, and by torch's separate steps under autograd."""
    alone, config, width = case.kind == "norm_backward", case.config, case.width
    x, grad_sum = torch.randn(rows, width) * 3, torch.randn(rows, width)
    branch, grad = (torch.randn(rows, width).to(case.dtype) for _ in range(2))
    scale, weight, bias = torch.randn(3, width)
    programs = min(2, triton.cdiv(rows, config.block_m))
    grad_x, parts = nans(rows, width, dtype=FP32), nans(programs, 3, width, dtype=FP32)
    grad_branch = nans(rows, width, dtype=case.dtype)
    given = (x, weight, grad) if alone else (x, branch, scale, weight, grad_sum, grad)
    tensors = [m.put(bits(t)) for t in given] + [m.put(grad_x)] + ([] if alone else [m.put(grad_branch)])
    run(case, m, [*tensors, m.put(parts), rows, programs, 1e-5], programs)
    sums = torch.from_numpy(parts).sum(0)
    found = [grad_x, *(t.numpy() for t in (sums[:2] if alone else sums))] + ([] if alone else [grad_branch])

    def steps(wide: torch.dtype | None) -> list[Any]:
        """Of the stream, weight, bias, scale and branch; `x` is the stream after the branch."""
        normed = (x if wide is None else x.to(wide)).requires_grad_()
        leaves = [t.clone() if wide is None else t.to(wide) for t in (weight, bias, scale, branch)]
        w, b, s, more = (t.requires_grad_() for t in leaves)
        total = normed if alone else normed + (more.to(normed.dtype) * s - (more.to(normed.dtype) * s).detach())
        out = torch.nn.functional.layer_norm(total, (width,), w, b, 1e-5).to(wide or case.dtype)
        outputs = [(out, grad)] if alone else [(total, grad_sum), (out, grad)]
        torch.autograd.backward([o for o, _ in outputs], [g.to(o.dtype) for o, g in outputs])
        return [t.grad for t in ((normed, w, b) if alone else (normed, w, b, s, more))]

    return _errors(found, steps(torch.float64), steps(None))
