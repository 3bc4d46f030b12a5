"""Device and dtype from the names that users give."""

from collections.abc import Callable
from typing import Any

import torch

from .errors import InputError

__all__ = ["find_device", "find_dtype", "mps_available"]


def find_device(device: str | torch.device, why_not_mps: Callable[[], str | None]) -> tuple[torch.device, str | None]:
    """Resolve a device name.

    Args:
        device: A torch device or its name; "auto" is cuda, then mps, then cpu.
        why_not_mps: A trial of the Apple GPU, called only if mps was chosen; returns why mps cannot be used, or None.

    Returns: The device, and why it is the CPU although an Apple GPU is there (None otherwise).

    Raises:
        InputError: The name is no device, or the device is not there.
    """
    if device == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps_available() else "cpu"
        found = torch.device(name)
    else:
        try:
            found = torch.device(device)
        except (RuntimeError, TypeError):
            raise InputError(f"device is 'auto' or a torch device such as 'cpu' or 'cuda:1'; got {device!r}") from None
        if (lacking := _lacking(found)) is not None:
            raise InputError(f"device {str(device)!r} is not available: {lacking}; use 'auto' or 'cpu'")
    if found.type == "mps" and (reason := why_not_mps()) is not None:
        return torch.device("cpu"), reason
    return found, None


def _lacking(device: torch.device) -> str | None:
    if device.type in ("cpu", "meta"):
        return None
    if device.type == "mps":
        return None if mps_available() else "this torch sees no Apple GPU"
    label = {"cuda": "CUDA"}.get(device.type, f"device of type {device.type}")
    module: Any = getattr(torch, device.type, None)
    if not hasattr(module, "is_available") or not module.is_available():
        return f"this torch sees no {label}"
    count = module.device_count()
    return f"there are {count}, numbered from 0" if device.index is not None and device.index >= count else None


def mps_available() -> bool:
    """Whether torch sees an Apple GPU."""
    return torch.backends.mps.is_available()


def find_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """Resolve the dtype of the linear layers; None for "auto".

    Raises: InputError for other values than float32, bfloat16, float16 and float64.
    """
    if dtype == "auto":
        return None
    resolved = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if resolved not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise InputError(f"dtype is 'auto', float32, bfloat16, float16 or float64; got {dtype!r}")
    return resolved
