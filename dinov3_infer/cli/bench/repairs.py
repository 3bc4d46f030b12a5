"""Two faults of other libraries that would keep them from taking part, mended."""

import ctypes
import importlib
import struct
import sys
from typing import Any

import torch

__all__ = ["mend_signal_stack", "mend_torchvision"]

_KEPT: list[Any] = []  # what a library defines goes with it


def mend_torchvision() -> None:
    """Makes a torchvision importable whose own library does not fit this torch, and so transformers and timm."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # it describes two operators that the library should have brought
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
    except ImportError:  # whoever needs it says so
        return


def mend_signal_stack() -> None:
    """Lets signal handlers run on the ordinary stack of this thread.

    OpenVINO 2026.4 gives them one of its own when a model is freed, and frees that too: the next signal, such as that a
    worker has ended, would end the process.
    """
    if sys.platform == "linux":
        none = struct.pack("@Pi4xN", 0, 2, 0)  # stack_t with SS_DISABLE
        ctypes.CDLL(None).sigaltstack(none, None)
