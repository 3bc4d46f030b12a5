"""Questions about the machine that compilers evaluate while tracing, and do not trace."""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

__all__ = ["constant_for_compilers", "distrust", "lacks_bfloat16", "why_distrusted"]

C = TypeVar("C", bound=Callable[..., Any])


def constant_for_compilers(function: C) -> C:
    """`torch.compiler.assume_constant_result`, without importing the compiler to set its mark."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@constant_for_compilers
def lacks_bfloat16(device: torch.device) -> bool:
    """Whether this is an NVIDIA GPU before Ampere, where torch emulates bfloat16 and Triton has no tensor cores."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return False
    return _capability(device) < (8, 0)


_DISTRUSTED: dict[torch.device, str] = {}  # devices whose results from our kernels were wrong, and why


def distrust(device: torch.device, reason: str) -> None:
    """Stop using our kernels on a device."""
    _DISTRUSTED[device] = reason


@constant_for_compilers
def why_distrusted(device: torch.device) -> str | None:
    """Why our kernels are not used on a device; None if they are."""
    return _DISTRUSTED.get(device)
