"""Launch configurations: a static table by pass, chip, width of a head and dtype, and then by length.

The rows were chosen by compiling for each chip (no spilled registers, shared memory within the chip's limit) and for
Hopper by what the compiled code reads and executes, see tests/support/ptx_counts.py.  They are not tuned by time yet;
DINOV3_INFER_AUTOTUNE=1 measures the candidates of a call once and takes the fastest.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "DTYPES",
    "ROTATION",
    "SHORT",
    "TABLE",
    "WIDTHS",
    "Config",
    "chip_of",
    "crossover",
    "precision",
    "select",
    "whole_heads",
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (64, 128)


@dataclass(frozen=True)
class Config:
    block_m: int  # queries of a tile
    block_n: int  # keys of a tile
    warps: int
    stages: int  # tiles in flight
    max_registers: int | None = None  # of a thread, on NVIDIA: fewer registers, more programs at a time
    whole: bool = False  # a program owns a whole head, see `short`; block_n is the most keys that it has room for

    def options(self) -> dict[str, Any]:
        """What a launch is given.  Newer versions of Triton fuse no multiplication with an addition unless asked."""
        options: dict[str, Any] = dict(num_warps=self.warps, num_stages=self.stages, enable_fp_fusion=True)
        return options if self.max_registers is None else options | dict(maxnreg=self.max_registers)


ROTATION = Config(64, 64, 4, 1)  # of kernels without a product: bound by memory
ANY = 2**31  # tokens

# (pass, width, bytes of an element) -> chip -> rows of a length in tokens (of the mean picture, if they differ) and the
# configuration.
# "small" is every chip with 64 to 100 KiB of shared memory: sm_86, sm_89, sm_120, AMD, Intel.
# fmt: off
TABLE: dict[tuple[str, int, int], dict[str, tuple[tuple[int, Config], ...]]] = {
    ("forward", 64, 2): {
        "sm80": ((ANY, Config(64, 32, 4, 1)),),
        "sm90": ((128, Config(64, 64, 4, 2)), (230, Config(128, 64, 8, 2)), (ANY, Config(128, 128, 8, 2))),
        "sm100": ((ANY, Config(64, 64, 4, 2)),),
        "small": ((ANY, Config(64, 32, 4, 1)),),
    },
    ("forward", 128, 2): {
        "sm80": ((ANY, Config(32, 32, 8, 2)),),
        "sm90": ((128, Config(64, 64, 8, 2)), (ANY, Config(128, 64, 8, 2))),
        "sm100": ((ANY, Config(128, 64, 8, 2)),),
        "small": ((ANY, Config(32, 32, 8, 1)),),
    },
    ("forward", 64, 4): {
        "sm80": ((ANY, Config(16, 32, 8, 1)),),
        "sm90": ((ANY, Config(64, 32, 4, 2)),),
        "sm100": ((ANY, Config(64, 32, 8, 2)),),
        "small": ((ANY, Config(16, 32, 8, 1)),),
    },
    ("key_value", 64, 2): {
        "sm80": ((ANY, Config(32, 64, 4, 2)),),
        "sm90": ((ANY, Config(64, 64, 4, 2)),),
        "sm100": ((ANY, Config(64, 64, 4, 2)),),
        "small": ((ANY, Config(32, 32, 4, 1)),),
    },
    ("key_value", 128, 2): {
        "sm80": ((ANY, Config(64, 64, 8, 2)),),
        "sm90": ((ANY, Config(64, 64, 8, 2)),),
        "sm100": ((ANY, Config(64, 64, 8, 2)),),
        "small": ((ANY, Config(32, 32, 4, 1)),),
    },
    ("key_value", 64, 4): {
        "sm80": ((ANY, Config(32, 32, 8, 1)),),
        "sm90": ((ANY, Config(32, 32, 8, 1)),),
        "sm100": ((ANY, Config(32, 32, 8, 1)),),
        "small": ((ANY, Config(32, 32, 8, 1)),),
    },
    ("query", 64, 2): {
        "sm80": ((ANY, Config(64, 32, 4, 2)),),
        "sm90": ((ANY, Config(128, 64, 8, 2)),),
        "sm100": ((ANY, Config(128, 64, 8, 2)),),
        "small": ((ANY, Config(64, 32, 4, 1)),),
    },
    ("query", 128, 2): {
        "sm80": ((ANY, Config(32, 32, 4, 2)),),
        "sm90": ((ANY, Config(128, 64, 8, 2)),),
        "sm100": ((ANY, Config(128, 64, 8, 2)),),
        "small": ((ANY, Config(32, 32, 4, 1)),),
    },
    ("query", 64, 4): {
        "sm80": ((ANY, Config(32, 32, 4, 2)),),
        "sm90": ((ANY, Config(64, 32, 8, 2)),),
        "sm100": ((ANY, Config(64, 32, 8, 2)),),
        "small": ((ANY, Config(32, 32, 8, 1)),),
    },
}
# fmt: on

# Chip -> rows of tokens and configuration of one program a head, forward: 16-bit tokens, heads of 64 channels.
# Smaller chips, among them those of other vendors, lack the shared memory.
SHORT: dict[str, tuple[tuple[int, Config], ...]] = {
    "sm80": ((224, Config(64, 224, 4, 1, whole=True)), (288, Config(32, 288, 4, 1, whole=True))),
    "sm90": ((272, Config(64, 272, 4, 1, whole=True)),),  # above it Triton 3.6 spills
    "sm100": ((288, Config(64, 288, 4, 1, whole=True)),),
}
LEAST = 129  # tokens: shorter images are two tiles or one, which the other kernel reads no more often

# float32 tiles of 128 channels do not fit the registers of any chip: this row is for the interpreter
_WIDE_SINGLE = Config(32, 32, 8, 1)


@cache
def chip_of(device: torch.device) -> str:
    """The column of the table.  Triton's interpreter, on a CPU, takes that of sm_90."""
    if device.type == "cpu":
        return "sm90"
    if device.type != "cuda" or torch.version.hip:
        return "small"
    capability = torch.cuda.get_device_capability(device)
    return {(8, 0): "sm80", (9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}.get(capability, "small")


@cache
def processors(device: torch.device) -> int:
    """Programs that run at a time, at the least; the interpreter takes those of an H100."""
    if device.type == "cpu":
        return 132
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 2**31))


def whole_heads(qkv: Tensor, tokens: int, heads: int) -> Config | None:
    """The configuration of one program a head, where it can run and keeps the chip busy.  `heads`: of all images."""
    if qkv.element_size() != 2 or qkv.shape[-1] != 64 or tokens < LEAST:
        return None
    rows = SHORT.get(chip_of(qkv.device), ())
    fitting = (config for limit, config in rows if tokens <= limit and heads >= processors(qkv.device))
    return next(fitting, None)


def select(
    kind: str,
    qkv: Tensor,
    longest: int,
    run: Callable[[Config], None],
    *,
    packed: bool,
    rotated: bool,
    whole: Config | None = None,
) -> Config:
    """`whole`, else the row of the table; the fastest of them and all rows where DINOV3_INFER_AUTOTUNE=1 asks for it.

    While a CUDA graph is captured nothing can be measured: there it is what was measured before, or the first of them.
    """
    key = (kind, qkv.shape[-1], qkv.element_size())
    chips = TABLE.get(key)
    if chips is None:
        return _WIDE_SINGLE
    row = whole or next(config for limit, config in chips[chip_of(qkv.device)] if longest <= limit)
    if os.environ.get("DINOV3_INFER_AUTOTUNE") != "1" or qkv.device.type == "cpu":
        return row
    place = (*key, qkv.dtype, packed, rotated, whole, qkv.device, longest.bit_length())
    if place not in _fastest:
        if _capturing(qkv.device):
            return row
        _fastest[place] = _measured({row, *(config for rows in chips.values() for _, config in rows)}, run)
    return _fastest[place]


# By kind, width, bytes and dtype of an element, packed, rotated, whole, device and the length's power of two; each is
# measured once in a process.
_fastest: dict[tuple[Any, ...], Config] = {}


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _measured(configs: Iterable[Config], run: Callable[[Config], None]) -> Config:
    """The fastest.  Raises what the last one raised where none of them runs."""
    from triton.errors import TritonError
    from triton.testing import do_bench

    times: dict[Config, float] = {}
    failure: Exception | None = None
    for config in configs:
        try:
            times[config] = do_bench(lambda config=config: run(config), warmup=5, rep=20)
        except (
            TritonError,
            RuntimeError,
        ) as error:  # a row of a larger chip
            failure = error
    if failure is not None and not times:
        raise failure
    return min(times, key=lambda config: times[config])


def precision(qkv: Tensor) -> str:
    """Of products: three TF32 products make one of float32 precision on NVIDIA's tensor cores."""
    return "tf32x3" if qkv.dtype == torch.float32 and qkv.is_cuda and not torch.version.hip else "ieee"


def crossover(device: torch.device, dtype: torch.dtype, width: int) -> int:
    """Tokens above which one rotation and torch's own attention are taken to be faster, without a gradient.

    Estimated, not measured yet: from published speeds, and off Hopper and Blackwell from what the compiled kernel
    reads and executes, which bounds it below FlashAttention-2 from a few hundred tokens on.
    """
    large = chip_of(device) in ("sm90", "sm100")
    return {64: 1600, 128: 1000}[width] if large else 500
