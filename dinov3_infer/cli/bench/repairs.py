"""Repairs of two faults of other libraries, without which they could not be measured."""

import ctypes
import importlib
import struct
import sys
from typing import Any

import torch

__all__ = ["mend_signal_stack", "mend_torchvision"]

_KEPT: list[Any] = []  # a library's definitions end with it


def mend_torchvision() -> None:
    """Makes a torchvision built for another torch importable, and with it transformers and timm."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # it describes two operators that its binary should have defined
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
    except ImportError:  # a library that needs it reports that
        return


def mend_signal_stack() -> None:
    """Makes signal handlers run on the ordinary stack of this thread.

    When a model is freed, OpenVINO 2026.4 sets a separate signal stack for this thread, and then frees that stack.
    Without this function the next signal, such as the end of a worker, would kill the process.
    """
    if sys.platform == "linux":
        none = struct.pack("@Pi4xN", 0, 2, 0)  # stack_t with SS_DISABLE
        ctypes.CDLL(None).sigaltstack(none, None)
