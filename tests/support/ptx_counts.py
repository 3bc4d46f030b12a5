"""Counts the cost of a head of the forward pass on Hopper while its PTX is executed, and the bound on its speed.

    python tests/support/ptx_counts.py          # prints the table
    python tests/support/ptx_counts.py --save   # and writes it to kernels/benchmarks/records/executed-<triton>.json

These numbers are computed, not measured: each is the number of clocks that one resource needs without any waiting.  A
multiprocessor of an H200 issues 4 warp instructions, multiplies 4096 pairs of 16-bit numbers and moves 128 bytes of
shared memory per clock; 26 bytes per clock are 6 TB/s from the L2 cache, published as 5.5 to 7.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import kernel_cases as kc  # first: it turns the interpreter off
import torch
import triton
from kernel_cases import BF16, FP16, FP32, Config, segments
from ptx_runs import Executor, Image, between

RECORDS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks" / "records"
PROCESSORS, CLOCK, L2_BYTES, SHARED_BYTES, PAIRS = 132, 1.755e9, 26, 128, 4096


def instructions(compiled: Any) -> tuple[int, int]:
    """SASS instructions of the longest loop, and of the whole kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    labels = {m.group(1): i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    jumps = [
        (labels[m.group(1)], i)
        for i, line in enumerate(lines) if (m := re.search(r"BRA.*`\((\.L_x_\d+)\)", line)) and m.group(1) in labels
    ]  # fmt: skip
    first, last = max((j for j in jumps if j[0] < j[1]), key=lambda j: j[1] - j[0])
    counted = [bool(re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+", line)) for line in lines]
    return sum(counted[first:last]), sum(counted)


def attention(n: int, grid: tuple[int, int], config: Config, tables: torch.dtype) -> dict[str, Any]:
    """The costs of one head of 64 channels in bfloat16."""
    image, run = Image(grid, 64, 1, BF16), Executor()
    out, _ = image.forward(run, "sm90", config, tables)
    kind = "short" if config.whole else "forward"
    counts, (loop, all_) = run.counts[kind], instructions(run.compiled[kind])
    blocks = -(-n // config.block_m)
    if config.whole:
        keys, programs, rounds = sum(segments(n)), 1, blocks
    else:
        rest = n % config.block_n
        keys = n - rest + (max(16, triton.next_power_of_2(rest)) if rest else 0)
        programs, rounds = blocks, n // config.block_n
    read = sum(v for k, v in counts.items() if k.startswith("global"))
    clocks = {
        "issue": (loop * rounds + all_ - loop) * programs * config.warps / 4,
        "tensor cores": 4 * 64 * blocks * config.block_m * keys / PAIRS,
        "shared memory": counts["wavefronts"] + counts["shared, wgmma"] / SHARED_BYTES,
        "L2": read / L2_BYTES,
    }
    return {
        "tokens": n,
        "tile": "one program a head" if config.whole else f"{config.block_m}x{config.block_n}",
        "warps": config.warps,
        "tables": str(tables)[6:],
        "error": image.judged(out),
        "instructions": {"loop": loop, "all": all_},  # of the compiled code, for a warp
        "bytes": read,
        "bytes_of_tables": counts["global, tensor 2"] + counts["global, tensor 3"],
        "clocks": {name: round(value) for name, value in clocks.items()},
        "bound": round(4 * n * n * 64 * PROCESSORS * CLOCK / max(clocks.values()) / 1e12),
    }


def steps() -> list[dict[str, Any]]:
    """Bytes that the kernels between products move, beside the smallest possible number."""
    found = []
    for case in kc.between("sm90"):
        if case.dtype != BF16 or case.out or case.width not in (384, 1024, 4096, 1536, 16):
            continue
        run = Executor()
        between(run, case, rows=8)
        counts = run.counts[case.kind]
        tensors = {k: v for k, v in counts.items() if k.startswith("global")}
        found.append(dict(kernel=case.kind, width=case.width, rows=8, bytes=tensors))
    return found


GRIDS = {201: (14, 14), 261: (16, 16), 1029: (32, 32)}


def main() -> None:
    torch.manual_seed(0)
    rows = []
    for n, grid in GRIDS.items():
        shipped = [next(c for limit, c in kc.TABLE["forward", 64, 2]["sm90"] if n <= limit)]
        shipped += [c for limit, c in kc.SHORT["sm90"] if n <= limit][:1]
        for config in shipped:
            for tables in (FP16, FP32):
                rows.append(attention(n, grid, config, tables))
                print(rows[-1], flush=True)
    found = dict(triton=triton.__version__, chip="sm_90a, assumed to be an H200", attention=rows, steps=steps())
    print(*found["steps"], sep="\n")
    if "--save" in sys.argv:
        path = RECORDS / f"executed-{triton.__version__}.json"
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
