"""Launch configurations: a static table by pass, chip, width of a head and dtype, and then by length.

The rows were chosen by compiling for each chip (no spilled registers, shared memory within the chip's limit), and for
Hopper by what the compiled code reads and executes, see tests/support/ptx_counts.py.  None was timed on a GPU yet.
DINOV3_INFER_AUTOTUNE=1 times the candidates of a call once and takes the fastest.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeAlias

import torch
import triton
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
    "large_batch",
    "precision",
    "select",
    "whole_head",
    "whole_heads",
    "why_too_old",
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
    whole: bool = False  # a program owns a whole head, see `short`; block_n is the largest number of keys

    def options(self) -> dict[str, Any]:
        """Options of a launch.  Newer versions of Triton fuse a multiplication with an addition only on request."""
        options: dict[str, Any] = dict(num_warps=self.warps, num_stages=self.stages, enable_fp_fusion=True)
        return options if self.max_registers is None else options | dict(maxnreg=self.max_registers)


ROTATION = Config(64, 64, 4, 1)  # of kernels without a product: bound by memory
ANY = 2**31  # tokens
Rows: TypeAlias = tuple[tuple[int, Config], ...]
Table: TypeAlias = dict[tuple[str, int, int], dict[str, Rows]]

# (pass, width, bytes of an element) -> chip -> rows of a length in tokens (of the mean image, if they differ) and the
# configuration.
# "small" is every chip with 64 to 100 KiB of shared memory: sm_86, sm_89, sm_120, AMD, Intel.
# fmt: off
TABLE: Table = {
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


def why_too_old() -> str | None:
    """Why this Triton is not used, or None.  An older compiler may leave out what makes a kernel right."""
    if _release(triton.__version__) >= (3, 6):
        return None
    return f"Triton {triton.__version__} is older than 3.6, the oldest that its kernels were tested with"


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def unfenced(version: str) -> bool:
    """Whether this Triton leaves out a fence: between copies in flight and the products that read them, on Hopper.

    The passes of the gradient have no other fence in their loops.  3.6 leaves it out and 3.9 has it, as the executor of
    PTX shows (tests/support/run_ptx.py); versions between were not looked at.
    """
    return _release(version) < (3, 9)


def fenced(table: Table) -> Table:
    """The table with one stage, so that nothing is in flight, for these passes over 16-bit numbers."""
    found = dict(table)
    for key in found:
        if key[0] in ("key_value", "query") and key[2] == 2:
            columns = {chip: _one_stage(found[key][chip]) for chip in ("sm90", "sm100")}
            found[key] = found[key] | columns
    return found


def _one_stage(rows: Rows) -> Rows:
    return tuple((limit, replace(config, stages=1)) for limit, config in rows)


if unfenced(triton.__version__):
    TABLE = fenced(TABLE)

# Chip -> rows of tokens and configuration of one program a head, forward: 16-bit tokens, heads of 64 channels.
# "small" stands for sm_86 and sm_89 here: other small chips have less shared memory, or were never compiled for.
# fmt: off
SHORT: dict[str, Rows] = {
    "sm80": ((224, Config(64, 224, 4, 1, whole=True)), (288, Config(32, 288, 4, 1, whole=True))),
    "sm90": ((272, Config(64, 272, 4, 1, whole=True)),),  # above it Triton 3.6 spills
    "sm100": ((288, Config(64, 288, 4, 1, whole=True)),),
    "small": (  # 129 to 144 tokens, and 256, spill with 32 rows
        (144, Config(16, 288, 4, 1, whole=True)), (255, Config(32, 288, 4, 1, whole=True)),
        (256, Config(16, 288, 4, 1, whole=True)), (288, Config(32, 288, 4, 1, whole=True)),
    ),
}
# fmt: on
LEAST = 129  # tokens: of shorter images, two tiles or one, the other kernel reads as little

# float32 tiles of 128 channels do not fit the registers of any chip; the interpreter uses this row
_WIDE_SINGLE = Config(32, 32, 8, 1)


@cache
def chip_of(device: torch.device) -> str:
    """The column of the table.  Triton's interpreter, on a CPU, uses that of sm_90."""
    if device.type == "cpu":
        return "sm90"
    if device.type != "cuda" or torch.version.hip:
        return "small"
    capability = torch.cuda.get_device_capability(device)
    return {(8, 0): "sm80", (9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}.get(capability, "small")


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors, each of which runs at least one program at a time; for the interpreter those of an H100."""
    if device.type == "cpu":
        return 132
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 2**31))


def whole_heads(qkv: Tensor, tokens: int, heads: int) -> Config | None:
    """The configuration of one program a head, where it can run and keeps the chip busy.  `heads`: of all images."""
    if qkv.element_size() != 2 or qkv.shape[-1] != 64:
        return None
    return whole_head(qkv.device, tokens) if heads >= processors(qkv.device) else None


def whole_head(device: torch.device, tokens: int) -> Config | None:
    """The configuration of one program a head for 16-bit heads of 64 channels, where the chip has room for it."""
    if tokens < LEAST or not _has_room(device):
        return None
    return next((config for limit, config in SHORT.get(chip_of(device), ()) if tokens <= limit), None)


def large_batch(device: torch.device, dtype: torch.dtype, width: int, tokens: int, heads: int) -> int:
    """Images from which a program owns a whole head, see `whole_heads`; 0: it never does."""
    if dtype.itemsize != 2 or width != 64 or whole_head(device, tokens) is None:
        return 0
    return -(-processors(device) // heads)


@cache
def _has_room(device: torch.device) -> bool:
    """Whether a head fits the shared memory: of the small chips, on those of NVIDIA with capability 8.6 and 8.9."""
    return chip_of(device) != "small" or (
        device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) in ((8, 6), (8, 9))
    )


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
    """`whole`, else the row of the table; with DINOV3_INFER_AUTOTUNE=1 the fastest of these and all other rows.

    Nothing can be timed while a CUDA graph is captured: then it is the one that was the fastest before, or the first.
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
# timed once in a process.
_fastest: dict[tuple[Any, ...], Config] = {}


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _measured(configs: Iterable[Config], run: Callable[[Config], None]) -> Config:
    """The fastest.  If none of them runs, raises the exception of the last one."""
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
        ) as error:  # a row for a larger chip
            failure = error
    if failure is not None and not times:
        raise failure
    return min(times, key=lambda config: times[config])


def precision(qkv: Tensor) -> str:
    """Of products: three TF32 products make one of float32 precision on NVIDIA's tensor cores."""
    return "tf32x3" if qkv.dtype == torch.float32 and qkv.is_cuda and not torch.version.hip else "ieee"


def crossover(device: torch.device, dtype: torch.dtype, width: int) -> int:
    """Tokens above which a rotation and torch's own attention are used, without a gradient.

    An estimate, not a measurement: from published speeds, and for chips other than Hopper and Blackwell from what the
    compiled kernel reads and executes, which bounds it below FlashAttention-2 from a few hundred tokens on.
    """
    large = chip_of(device) in ("sm90", "sm100")
    return {64: 1600, 128: 1000}[width] if large else 500
