"""Compiles every shipped configuration of the kernels for its chips, without a GPU, and judges what comes out.

    python tests/support/compile_kernels.py [sm90 ...]

Prints registers, shared memory and tensor core instructions of each; fails where registers spill, shared memory is over
the chip's limit, 16-bit products miss Hopper's wgmma, or ptxas has to serialise them (warnings C75xx).
"""

import io
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # what is interpreted is not compiled
os.environ |= dict(TRITON_ALWAYS_COMPILE="1", TRITON_DUMP_PTXAS_LOG="1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dinov3_infer_kernels.gpu.backward import delta_kernel, key_value_kernel, query_kernel
from dinov3_infer_kernels.gpu.configs import ROTATION, TABLE, Config
from dinov3_infer_kernels.gpu.forward import forward_kernel
from dinov3_infer_kernels.gpu.rotation import rotate_kernel

# chip -> compute capability, bytes of shared memory that a program may have
CHIPS = {"sm80": (80, 163 << 10), "sm90": (90, 227 << 10), "sm100": (100, 227 << 10), "small": (86, 99 << 10)}
KERNELS = {
    "forward": forward_kernel,
    "key_value": key_value_kernel,
    "query": query_kernel,
    "delta": delta_kernel,
    "rotate": rotate_kernel,
}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


class Case(NamedTuple):
    kind: str
    chip: str
    width: int
    dtype: torch.dtype
    config: Config
    packed: bool
    rotate: bool = True
    tail: int = 16  # of the forward pass over images of one size

    def constants(self) -> dict[str, Any]:
        c = self.config
        if self.kind in ("rotate", "delta"):
            return dict(D=self.width, BLOCK=c.block_m)
        found: dict[str, Any] = dict(D=self.width, BLOCK_M=c.block_m, BLOCK_N=c.block_n, ROTATE=self.rotate)
        found |= dict(PACKED=self.packed, PRECISION="tf32x3" if self.dtype == torch.float32 else "ieee")
        found |= {} if self.packed else dict(CU_SEQLENS=None)
        found |= {} if self.rotate else dict(COS=None, SIN=None)
        return found | (dict(TAIL=c.block_n if self.packed else self.tail) if self.kind == "forward" else {})

    def type_of(self, argument: str) -> str:
        if argument in ("COS", "SIN", "LSE", "DELTA"):
            return "*fp32"
        if argument == "CU_SEQLENS":
            return "*i32"
        if argument.isupper():
            return POINTERS[self.dtype]
        return "fp32" if argument in ("scale", "log_scale") else "i32"


def cases(chips: list[str]) -> list[Case]:
    """Every row of the table: fixed and packed input; float16 and packed input without rotation on one chip."""
    found = []
    for (kind, width, size), columns in TABLE.items():
        for chip in chips:
            for _, config in columns[chip]:
                dtype = torch.bfloat16 if size == 2 else torch.float32
                found += [Case(kind, chip, width, dtype, config, packed) for packed in (False, True)]
                if chip == "sm90":
                    found.append(Case(kind, chip, width, dtype, config, True, rotate=False))
                    found += [Case(kind, chip, width, torch.float16, config, False)] if size == 2 else []
    for kind in ("rotate", "delta"):
        found += [
            Case(kind, chip, width, dtype, ROTATION, False)
            for chip in chips for width in (64, 128) for dtype in (torch.bfloat16, torch.float32)
        ]  # fmt: skip
    return list(dict.fromkeys(found))


def built(case: Case) -> Any:
    """What Triton makes of it."""
    kernel, constants = KERNELS[case.kind], case.constants()
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else case.type_of(name) for name in names}
    aligned = [n for n in names if signature[n][0] == "*" or n.startswith(("stride", "qk_", "v_"))]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", CHIPS[case.chip][0], 32), options=case.config.options())


def compiled(case: Case) -> tuple[str, list[str]]:
    """A line of the table, and what is wrong."""
    limit = CHIPS[case.chip][1]
    with redirect_stdout(io.StringIO()) as log:
        result = built(case)
    report = log.getvalue()
    registers = int(re.findall(r"Used (\d+) registers", report)[-1])
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))
    tensor = {name: len(re.findall(name, result.asm["ptx"])) for name in ("wgmma.mma_async", "mma.sync", "tcgen05.mma")}
    shared = result.metadata.shared
    kind = f"{case.kind}{' packed' if case.packed else ''}{'' if case.rotate else ' unrotated'}"
    c = case.config
    line = (
        f"{kind:26} {case.chip:6} D{case.width:<4} {str(case.dtype)[6:]:9} "
        f"{c.block_m:3}x{c.block_n:<3} {c.warps} warps "
        f"{c.stages} stages: {registers:3} registers {shared >> 10:3} KiB "
        + " ".join(f"{v} {k}" for k, v in tensor.items() if v)
    )
    wrong = [f"{spilled} bytes spilled"] if spilled else []
    wrong += [f"{shared} bytes of shared memory, {limit} is the limit"] if shared > limit else []
    wrong += [f"ptxas warns: {warning}" for warning in re.findall(r"\(C75\d\d\)", report)]
    products = case.kind in ("forward", "key_value", "query") and case.dtype != torch.float32
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
