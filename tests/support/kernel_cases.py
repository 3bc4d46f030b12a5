"""Every shipped configuration of every kernel as input of the compiler: constants, argument types, a chip."""

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels are not compiled
os.environ |= dict(TRITON_ALWAYS_COMPILE="1", TRITON_DUMP_PTXAS_LOG="1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dinov3_infer_kernels.gpu.backward import delta_kernel, key_value_kernel, query_kernel
from dinov3_infer_kernels.gpu.configs import ROTATION, SHORT, TABLE, Config
from dinov3_infer_kernels.gpu.forward import forward_kernel
from dinov3_infer_kernels.gpu.norms import norm_backward_kernel, norm_config, norm_kernel
from dinov3_infer_kernels.gpu.pointwise import SWIGLU, swiglu_kernel, unfold_config, unfold_kernel
from dinov3_infer_kernels.gpu.rotation import rotate_kernel
from dinov3_infer_kernels.gpu.short import segments, short_kernel

__all__ = [
    "CHIPS",
    "PRODUCTS",
    "ROTATION",
    "SHORT",
    "TABLE",
    "Case",
    "Config",
    "between",
    "built",
    "cases",
    "segments",
    "whole",
]

# chip -> compute capability, bytes of shared memory per program
CHIPS = {"sm80": (80, 163 << 10), "sm90": (90, 227 << 10), "sm100": (100, 227 << 10), "small": (86, 99 << 10)}
KERNELS = {
    "forward": forward_kernel,
    "short": short_kernel,
    "key_value": key_value_kernel,
    "query": query_kernel,
    "delta": delta_kernel,
    "rotate": rotate_kernel,
    "norm": norm_kernel,
    "residual_norm": norm_kernel,
    "norm_backward": norm_backward_kernel,
    "residual_norm_backward": norm_backward_kernel,
    "swiglu": swiglu_kernel,
    "unfold": unfold_kernel,
}
PRODUCTS = ("forward", "short", "key_value", "query")  # kernels that multiply matrices
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
POINTERS = {BF16: "*bf16", FP16: "*fp16", FP32: "*fp32", torch.int32: "*i32", torch.uint8: "*u8"}
# arguments that are always float32
SINGLE = {"LSE", "DELTA", "X", "SUM", "SCALE", "WEIGHT", "BIAS", "GRAD_SUM", "GRAD_X", "PARTS"}
# arguments that are absent from a norm without a branch
ABSENT = {"norm": ("BRANCH", "SCALE"), "norm_backward": ("BRANCH", "SCALE", "GRAD_SUM", "GRAD_BRANCH")}


class Case(NamedTuple):
    kind: str
    chip: str
    width: int  # width of a head; channels of a norm, hidden width of SwiGLU, side of a patch
    dtype: torch.dtype  # of tokens
    config: Config
    packed: bool = False
    rotate: bool = True
    tail: int = 16  # of the forward pass over images of one size
    tables: torch.dtype = FP32  # of cosines and sines
    tokens: int = 261  # of an image, where a program owns a head
    out: torch.dtype | None = None  # of a norm, where it is not that of the branch

    def constants(self) -> dict[str, Any]:
        c = self.config
        if "norm" in self.kind:
            return dict(C=self.width, BLOCK=c.block_n, ROWS=c.block_m) | dict.fromkeys(ABSENT.get(self.kind, ()))
        if self.kind == "swiglu":
            return dict(BLOCK=c.block_n, ROWS=c.block_m)
        if self.kind == "unfold":
            return dict(PATCH=self.width, BLOCK=c.block_n, PATCHES=c.block_m, stride_column=1)
        if self.kind in ("rotate", "delta"):
            return dict(D=self.width, BLOCK=c.block_m)
        if self.kind == "short":
            return dict(zip(("KEYS", "MIDDLE", "TAIL"), segments(self.tokens), strict=True)) | dict(
                D=self.width, BLOCK_M=c.block_m
            )
        found: dict[str, Any] = dict(D=self.width, BLOCK_M=c.block_m, BLOCK_N=c.block_n, ROTATE=self.rotate)
        found |= dict(PACKED=self.packed, PRECISION="tf32x3" if self.dtype == FP32 else "ieee")
        found |= {} if self.packed else dict(CU_SEQLENS=None)
        found |= {} if self.rotate else dict(COS=None, SIN=None)
        return found | (dict(TAIL=c.block_n if self.packed else self.tail) if self.kind == "forward" else {})

    def type_of(self, argument: str) -> str:
        if not argument.isupper():
            floats = argument in ("scale", "log_scale", "eps") or argument.startswith(("mean_", "std_"))
            return "fp32" if floats else "i32"
        special = {"CU_SEQLENS": torch.int32, "IMAGES": torch.uint8, "COS": self.tables, "SIN": self.tables}
        special |= dict.fromkeys(SINGLE, FP32) | ({"OUT": self.out} if self.out else {})
        return POINTERS[special.get(argument, self.dtype)]

    def aligned(self, argument: str) -> bool:
        """Whether an argument is a multiple of 16 in all models, which the compiler can use."""
        return argument.isupper() or argument.startswith(("stride", "qk_", "v_")) or argument == "width"


def whole(chip: str) -> list[Case]:
    """Kernels with one program per head: every split of the keys of an image, with both kinds of tables."""
    found, seen = [], set()
    for tokens in range(129, 289):
        for config in [c for limit, c in SHORT.get(chip, ()) if tokens <= limit][:1]:
            if (key := (config, segments(tokens))) not in seen:
                seen.add(key)
                found += [Case("short", chip, 64, BF16, config, tokens=tokens, tables=t) for t in (FP16, FP32)]
    return found


def between(chip: str) -> list[Case]:
    """The kernels between matrix products, for the widths of the released models."""
    found = []
    for width in (384, 768, 1024, 1280, 1536, 4096):
        found += [Case(kind, chip, width, BF16, norm_config(width)) for kind in ("norm", "residual_norm")]
        found.append(Case("residual_norm", chip, width, BF16, norm_config(width), out=FP32))
        found += [Case(f"{kind}_backward", chip, width, BF16, norm_config(width)) for kind in ("norm", "residual_norm")]
    found += [Case("swiglu", chip, 1536, dtype, SWIGLU) for dtype in (BF16, FP32)]
    return found + [Case("unfold", chip, p, dtype, unfold_config(p)) for p in (8, 14, 16) for dtype in (BF16, FP32)]


def cases(chips: list[str]) -> list[Case]:
    """Every row of the tables, with fixed and packed input; on one chip, more variants."""
    found = []
    for (kind, width, size), columns in TABLE.items():
        for chip in chips:
            for _, config in columns[chip]:
                dtype = BF16 if size == 2 else FP32
                found += [Case(kind, chip, width, dtype, config, packed) for packed in (False, True)]
                if size == 2:
                    forms = (False, True) if kind == "forward" else (False,)
                    found += [Case(kind, chip, width, dtype, config, packed, tables=FP16) for packed in forms]
                if chip == "sm90":
                    found.append(Case(kind, chip, width, dtype, config, True, rotate=False))
                    found += [Case(kind, chip, width, FP16, config, False)] if size == 2 else []
    found += [
        Case(kind, chip, width, dtype, ROTATION)
        for kind in ("rotate", "delta") for chip in chips for width in (64, 128) for dtype in (BF16, FP32)
    ]  # fmt: skip
    found += [case for chip in chips for case in whole(chip) + between(chip)]
    return list(dict.fromkeys(found))


def built(case: Case) -> Any:
    """The kernel that Triton compiles."""
    kernel, constants = KERNELS[case.kind], case.constants()
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else case.type_of(name) for name in names}
    aligned = [name for name in names if signature[name] != "constexpr" and case.aligned(name)]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", CHIPS[case.chip][0], 32), options=case.config.options())
