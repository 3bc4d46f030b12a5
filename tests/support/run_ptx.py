"""Executes the compiled PTX of every shipped configuration without a GPU (see ptx.py), and checks the results.

    python tests/support/run_ptx.py            # all rows, forward and backward, for sm_80, sm_86 and sm_90a: minutes
    python tests/support/run_ptx.py part       # some of them, in seconds
    python tests/support/run_ptx.py mutants    # remove one barrier, fence or wait at a time: is a fault found?

A result passes if its error against float64 is at most twice that of torch's attention in the same dtype, and for the
kernels between products at most that of torch's separate steps.
"""

import collections
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import kernel_cases as kc  # first: it turns the interpreter off
import ptx
import torch
import triton
from kernel_cases import BF16, FP16, FP32
from ptx_runs import SYNCHRONISES, Executor, Image, between

CHIPS = ("sm80", "sm90", "small")
Pairs = list[tuple[float, float]]  # (our error, torch's error)
Judged = tuple[str, Callable[[Executor], Pairs], float]  # (name, function that runs it, allowed factor)


def attention(chip: str, width: int, dtype: torch.dtype, tables: torch.dtype, gradient: bool, grid: Any) -> Any:
    """Every tile of the forward pass for heads of this width; the first one also with its gradient."""
    size, heads = dtype.itemsize, 1 if dtype == FP32 or not gradient else 2
    rows = {kind: kc.TABLE[kind, width, size][chip] for kind in ("forward", "key_value", "query")}
    image = Image(grid, width, heads, dtype)

    def judged(config: kc.Config, gradient: bool) -> Callable[[Executor], Pairs]:
        def run(executor: Executor) -> Pairs:
            out, lse = image.forward(executor, chip, config, tables)
            pairs = [image.judged(out)]
            if gradient:
                first = {kind: rows[kind][0][1] for kind in ("key_value", "query")}
                pairs.append(image.judged(image.backward(executor, chip, first, out, lse, tables), True))
            return pairs

        return run

    for config in dict.fromkeys(config for _, config in rows["forward"]):
        name = f"{chip} D{width} {str(dtype)[6:]} {config.block_m}x{config.block_n} tables {str(tables)[6:]}"
        yield name, judged(config, gradient), 2.0
        gradient = False


def whole(chip: str, dtype: torch.dtype, tables: torch.dtype, grids: tuple[tuple[int, int], ...]) -> Iterator[Judged]:
    """The kernels with one program per head."""
    for grid in grids:
        image = Image(grid, 64, 2, dtype)
        for config in [c for limit, c in kc.SHORT.get(chip, ()) if image.n <= limit][:1]:
            name = f"{chip} D64 {str(dtype)[6:]} {image.n} tokens, one program a head, tables {str(tables)[6:]}"
            yield name, lambda run, i=image, c=config: [i.judged(i.forward(run, chip, c, tables)[0])], 2.0  # type: ignore[misc]


def steps(chip: str, some: bool = False) -> Iterator[Judged]:
    """The kernels between products."""
    few = ("residual_norm", "residual_norm_backward", "swiglu", "unfold")
    for case in kc.between(chip):
        if not some or case.dtype == BF16 and case.width in (1024, 1536, 16) and not case.out and case.kind in few:
            name = f"{chip} {case.kind} {case.width} {str(case.dtype)[6:]}{' to float32' if case.out else ''}"
            yield name, lambda run, case=case: between(run, case), 1.01  # type: ignore[misc]


GRIDS = ((4, 31), (4, 49), (10, 25), (16, 16), (8, 35))  # 129, 201, 255, 261 and 285 tokens


def everything(chip: str) -> Iterator[Judged]:
    for width, dtype in ((64, BF16), (64, FP16), (128, BF16), (128, FP16), (64, FP32)):
        for tables in (FP32,) if dtype == FP32 else (FP32, FP16):
            yield from attention(chip, width, dtype, tables, True, (8, 8) if dtype == FP32 else (8, 16))
    for dtype, tables in ((BF16, FP16), (BF16, FP32), (FP16, FP16)):
        yield from whole(chip, dtype, tables, GRIDS)
    yield from steps(chip)


def part(chip: str) -> Iterator[Judged]:
    yield from attention(chip, 64, BF16, FP16, False, (4, 16))
    yield from whole(chip, BF16, FP16, GRIDS[:1])
    yield from steps(chip, some=True) if chip == "sm90" else ()


def wrong(name: str, run: Callable[[Executor], Pairs], factor: float) -> bool:
    """Prints a line of the table, and returns whether it fails."""
    try:
        pairs = run(Executor())
        bad = any(not ours <= factor * theirs + 1e-7 for ours, theirs in pairs)
        told = ", ".join(f"{ours:.2e} (torch {theirs:.2e})" for ours, theirs in pairs)
    except (ptx.Fault, NotImplementedError) as fault:
        bad, told = True, repr(fault)
    print(f"{name}: {told}{' <-- WRONG' if bad else ''}", flush=True)
    return bad


# --- mutants -------------------------------------------------------------------------------------------------------

SUBJECTS = {("residual_norm", 1024), ("norm", 384), ("residual_norm_backward", 1024), ("unfold", 16)}


def subjects(chip: str) -> Iterator[tuple[str, Callable[[Executor], Pairs], float]]:
    """Kernels that synchronise: the name in the executor, a run that returns its error, and the correct error."""
    image = Image((8, 16), 64, 1, BF16)
    rows = {kind: kc.TABLE[kind, 64, 2][chip][0][1] for kind in ("forward", "key_value", "query")}
    out, lse = image.forward(Executor(), chip, rows["forward"])

    def gradient(kind: str, parts: slice) -> Callable[[Executor], Pairs]:
        row = {kind: rows[kind]}
        return lambda run: [image.judged(image.backward(run, chip, row, out, lse, FP16), True, parts)]

    yield "forward", lambda run: [image.judged(image.forward(run, chip, rows["forward"], FP16)[0])], 5e-3
    for _, config in kc.SHORT.get(chip, ())[:1]:
        yield "short", lambda run, c=config: [image.judged(image.forward(run, chip, c, FP16)[0])], 5e-3  # type: ignore[misc]
    yield "key_value", gradient("key_value", slice(1, 3)), 8e-3
    yield "query", gradient("query", slice(1)), 8e-3
    for case in kc.between(chip):
        if case.dtype == BF16 and (case.kind, case.width) in SUBJECTS:
            yield case.kind, lambda run, case=case: between(run, case), 5e-3  # type: ignore[misc]


# Lines whose removal changes nothing, and why: the executor has seen that the accesses which the line would order do
# not occur.
HARMLESS = {
    "bar.sync": "no warp touches what another one has touched since the barrier before",
    "cp.async.commit_group": "its copies join the next group, and are waited for before they are read",
    "cp.async.wait_group": "nothing touches what its copies fill",
    "fence.proxy": "an earlier fence covers what the products behind it read from shared memory",
    "wgmma.wait_group": "nothing touches operands or results before a later wait, or no product is under way",
}


def mutants(chip: str) -> tuple[int, int]:
    """(number of mutants whose fault is found, number of mutants); a mutant lacks one line of synchronisation."""
    found = collections.Counter[tuple[str, str, str]]()
    for kind, run, right in subjects(chip):
        untouched = Executor()
        pairs = run(untouched)
        assert all(ours < right for ours, _ in pairs), (kind, pairs)
        for number, line in enumerate(untouched.lines[kind]):
            if (m := SYNCHRONISES.match(line)) is None:
                continue
            try:
                same = run(Executor(kind, number)) == pairs
                result = f"harmless: {HARMLESS[m.group(1)]}" if same else "noticed: other numbers"
            except ptx.Fault as fault:
                result = "noticed: " + re.sub(r"%\w+", "a register", str(fault))
            found[kind, m.group(1), result] += 1
    for (kind, what, result), count in sorted(found.items()):
        print(f"{chip} {kind}, {count} without one {what}: {result}", flush=True)
    return sum(count for (*_, result), count in found.items() if result.startswith("noticed")), found.total()


def main(what: str) -> int:
    print(f"triton {triton.__version__}")
    torch.manual_seed(0)
    if what == "mutants":
        counts = [mutants(chip) for chip in ("sm80", "sm90")]
        noticed, of = (sum(pair[i] for pair in counts) for i in (0, 1))
        print(f"{noticed} of {of} noticed")
        return int(noticed < 0.7 * of)
    chosen = part if what == "part" else everything
    failures = sum(wrong(*judged) for chip in CHIPS for judged in chosen(chip))
    print(f"{failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "all"))
