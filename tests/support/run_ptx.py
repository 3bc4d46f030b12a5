"""Executes the compiled PTX of every shipped configuration without a GPU (see ptx.py), and judges what comes out.

    python tests/support/run_ptx.py            # forward and backward of all rows for sm_80, sm_86 and sm_90a: minutes
    python tests/support/run_ptx.py short      # a part of it, in seconds
    python tests/support/run_ptx.py mutants    # one barrier, fence or wait less at a time: is it noticed?

Judge: an error against float64 of at most twice that of torch's own attention in the same dtype.
"""

import collections
import io
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import compile_kernels as ck  # first: it turns the interpreter off
import numpy as np
import ptx
import torch
import triton

from dinov3_infer.model.attention import sdpa_attention
from dinov3_infer.model.rope import rope_periods, rope_table

LOG2_E = 1.4426950408889634
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CHIPS = ("sm80", "sm90", "small")
SYNCHRONISES = re.compile(
    r"\s*(?:@%p\d+ )?(bar\.sync|fence\.proxy|cp\.async\.wait_group|cp\.async\.commit_group|wgmma\.wait_group)"
)


def bits(t: Any) -> np.ndarray:
    t = t.contiguous()
    return t.view(torch.int16).numpy() if t.element_size() == 2 else t.numpy()


def nans(*shape: int, dtype: torch.dtype) -> np.ndarray:
    return bits(torch.full(shape, float("nan"), dtype=dtype)).copy()


def error(found: Any, expected: Any) -> float:
    return float((found.double() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


class Image:
    """The attention of one image: what goes in, and what should come out."""

    def __init__(self, grid: tuple[int, int], width: int, heads: int, dtype: torch.dtype) -> None:
        self.n, self.d, self.h, self.dtype, self.scale = grid[0] * grid[1] + 5, width, heads, dtype, width**-0.5
        self.qkv = torch.randn(1, self.n, 3, heads, width).to(dtype)
        self.grad = torch.randn(1, self.n, heads * width).to(dtype)
        self.cos, self.sin = rope_table(grid, rope_periods(width), 5)
        x, y = self.qkv.double().requires_grad_(), self.qkv.clone().requires_grad_()
        self.exact, self.torchs = (sdpa_attention(t, self.cos, self.sin) for t in (x, y))
        self.exact.backward(self.grad.double())
        self.torchs.backward(self.grad)
        self.exact, self.torchs = self.exact.detach(), self.torchs.detach()
        self.exact_grad, self.torchs_grad = x.grad, y.grad

    def run(
        self, kind: str, chip: str, config: ck.Config, arguments: list[Any], memory: Any, programs: int, cut: int = -1
    ) -> list[str]:
        """Executes all programs of a kernel, `cut` a line that is left out; the lines of its PTX."""
        rest = self.n % config.block_n
        tail = max(16, triton.next_power_of_2(rest)) if rest else 0
        with redirect_stdout(io.StringIO()):
            compiled = ck.built(ck.Case(kind, chip, self.d, self.dtype, config, False, tail=tail))
        lines = compiled.asm["ptx"].splitlines()
        text = "\n".join(line for number, line in enumerate(lines) if number != cut)
        program = ptx.Program(text, compiled.metadata.shared, config.warps * 32)
        for number in range(programs):
            program.run(arguments, memory, number)
        return lines

    def forward(self, chip: str, config: ck.Config, cut: int = -1) -> tuple[Any, np.ndarray, list[str]]:
        out = nans(1, self.n, self.h * self.d, dtype=self.dtype)
        lse = nans(1, self.h, self.n, dtype=FP32)
        m, strides = ptx.Memory(), self.qkv.stride()[:4]
        tensors = [*(m.put(bits(t)) for t in (self.qkv, self.cos, self.sin)), m.put(out), m.put(lse)]
        arguments = [*tensors, self.n, self.n, self.h, *strides, self.scale * LOG2_E]
        programs = triton.cdiv(self.n, config.block_m) * self.h
        lines = self.run("forward", chip, config, arguments, m, programs, cut)
        return torch.from_numpy(out).view(self.dtype), lse, lines

    def backward(self, chip: str, rows: dict[str, ck.Config], out: Any, lse: np.ndarray) -> Any:
        n, d, h, m = self.n, self.d, self.h, ptx.Memory()
        delta, qk = nans(1, h, n, dtype=FP32), nans(1, n, 2, h, d, dtype=self.dtype)
        dqkv = nans(1, n, 3, h, d, dtype=self.dtype)
        g, o, q, c, s = (m.put(bits(t)) for t in (self.grad, out, self.qkv, self.cos, self.sin))
        de, k, ls, dq = m.put(delta), m.put(qk), m.put(lse), m.put(dqkv)
        v, stride = q + 2 * h * d * self.qkv.element_size(), self.qkv.stride()
        strides = [n * 2 * h * d, 2 * h * d, h * d, d, stride[0], stride[1], stride[3]]
        both = [k, v, c, s, g, ls, de, dq, n, n, h, *strides, self.scale, self.scale * LOG2_E]
        self.run("delta", chip, ck.ROTATION, [g, o, de, n, h], m, triton.cdiv(n, 64) * h)
        self.run("rotate", chip, ck.ROTATION, [q, c, s, k, n, h, *stride[:4]], m, 2 * triton.cdiv(n, 64) * h)
        self.run("key_value", chip, rows["key_value"], both, m, triton.cdiv(n, rows["key_value"].block_n) * h)
        self.run("query", chip, rows["query"], both, m, triton.cdiv(n, rows["query"].block_m) * h)
        return torch.from_numpy(dqkv).view(self.dtype)


def judged(chip: str, width: int, dtype: torch.dtype, gradient: bool = True, grid: Any = None, heads: int = 2) -> int:
    """Prints a line for each configuration of the forward pass; how many are wrong."""
    size, wrong = dtype.itemsize, 0
    rows = {kind: ck.TABLE[kind, width, size][chip] for kind in ("forward", "key_value", "query")}
    image = Image(grid or ((8, 8) if size == 4 else (8, 16)), width, heads, dtype)
    for config in dict.fromkeys(config for _, config in rows["forward"]):
        try:
            out, lse, _ = image.forward(chip, config)
            pairs = [(error(out, image.exact), error(image.torchs, image.exact))]
            if gradient:
                found = image.backward(chip, {kind: rows[kind][0][1] for kind in ("key_value", "query")}, out, lse)
                pairs.append((error(found, image.exact_grad), error(image.torchs_grad, image.exact_grad)))
            bad = any(not ours <= 2 * theirs + 1e-7 for ours, theirs in pairs)
            told = ", ".join(f"{ours:.2e} (torch {theirs:.2e})" for ours, theirs in pairs)
        except (ptx.Fault, NotImplementedError) as fault:
            bad, told = True, repr(fault)
        wrong += bad
        tile = f"{config.block_m}x{config.block_n}"
        print(f"{chip} D{width} {str(dtype)[6:]} {tile}: {told}{' <-- WRONG' if bad else ''}", flush=True)
    return wrong


def mutants(chip: str, grid: tuple[int, int]) -> tuple[int, int]:
    """How many kernels without one line of synchronisation are noticed, and of how many."""
    image, found = Image(grid, 64, 1, BF16), collections.Counter[tuple[str, str]]()
    config = ck.TABLE["forward", 64, 2][chip][0][1]
    for number, line in enumerate(image.forward(chip, config)[2]):
        if (m := SYNCHRONISES.match(line)) is None:
            continue
        try:
            right = error(image.forward(chip, config, number)[0], image.exact) < 5e-3
            found[m.group(1), "not noticed" if right else "wrong numbers"] += 1
        except ptx.Fault as fault:
            found[m.group(1), str(fault)] += 1
    for (what, result), count in sorted(found.items()):
        print(f"{chip}, without one {what}: {result} ({count})", flush=True)
    return sum(count for (_, result), count in found.items() if result != "not noticed"), found.total()


def main(what: str) -> int:
    print(f"triton {triton.__version__}")
    torch.manual_seed(0)
    if what == "short":
        return int(sum(judged(chip, 64, BF16, gradient=False, grid=(4, 16), heads=1) for chip in CHIPS) > 0)
    if what == "mutants":
        counts = [mutants(chip, (8, 16)) for chip in ("sm80", "sm90")]
        noticed, of = (sum(pair[i] for pair in counts) for i in (0, 1))
        print(f"{noticed} of {of} noticed")
        return int(noticed < 0.7 * of)
    kinds = ((64, BF16), (64, FP16), (128, BF16), (128, FP16), (64, FP32))
    failures = sum(
        judged(chip, width, dtype, heads=1 if dtype == FP32 else 2) for chip in CHIPS for width, dtype in kinds
    )
    print(f"{failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "all"))
