"""Compiles every shipped configuration of the kernels for its chips, without a GPU, and checks the result.

    python tests/support/compile_kernels.py [sm90 ...]

Prints the registers, shared memory and tensor core instructions of each.  Fails if registers spill, shared memory
exceeds the limit of the chip, 16-bit products do not use Hopper's wgmma, or ptxas serialises them (warnings C75xx).
"""

import io
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout

import kernel_cases  # noqa: F401  # first: it turns the interpreter off
import torch
import triton
from kernel_cases import CHIPS, PRODUCTS, Case, built, cases

# Bytes that 3.6 spills in a kernel of training; 3.9 spills none.
SPILLS = {("residual_norm_backward", chip, "3.6"): 24 for chip in ("sm80", "sm90", "small")}


def compiled(case: Case) -> tuple[str, list[str]]:
    """A line of the table, and the faults."""
    limit = CHIPS[case.chip][1]
    with redirect_stdout(io.StringIO()) as log:
        result = built(case)
    report = log.getvalue()
    registers = int(re.findall(r"Used (\d+) registers", report)[-1])
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))
    tensor = {name: len(re.findall(name, result.asm["ptx"])) for name in ("wgmma.mma_async", "mma.sync", "tcgen05.mma")}
    shared = result.metadata.shared
    kind = f"{case.kind}{' packed' if case.packed else ''}{'' if case.rotate else ' unrotated'}"
    kind += f" of {case.tokens}" if case.kind == "short" else ""
    kind += " tables16" if case.tables == torch.float16 else ""
    c = case.config
    line = (
        f"{kind:26} {case.chip:6} D{case.width:<4} {str(case.dtype)[6:]:9} "
        f"{c.block_m:3}x{c.block_n:<3} {c.warps} warps "
        f"{c.stages} stages: {registers:3} registers {shared >> 10:3} KiB "
        + " ".join(f"{v} {k}" for k, v in tensor.items() if v)
    )
    accepted = SPILLS.get((case.kind, case.chip, triton.__version__[:3]), 0)
    wrong = [f"{spilled} bytes spilled"] if spilled > accepted else []
    wrong += [f"{shared} bytes of shared memory, {limit} is the limit"] if shared > limit else []
    wrong += [f"ptxas warns: {warning}" for warning in re.findall(r"\(C75\d\d\)", report)]
    products = case.kind in PRODUCTS and case.dtype != torch.float32
    wrong += ["no wgmma"] if case.chip == "sm90" and products and not tensor["wgmma.mma_async"] else []
    return line, wrong


def main(chips: list[str]) -> int:
    print(f"triton {triton.__version__}")
    failures = 0
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        for line, wrong in pool.map(compiled, cases(chips)):
            print(line, *(f"<-- {what}" for what in wrong), flush=True)
            failures += bool(wrong)
    print(f"{failures} of {len(cases(chips))} configurations fail")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(CHIPS)))
