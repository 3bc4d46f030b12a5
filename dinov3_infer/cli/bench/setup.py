"""The setup that all contestants share: a model, an input size, and the weights in every layout."""

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ...backbone import Backbone

__all__ = ["Call", "Contestant", "Precision", "Setup", "quiet"]

Precision = Literal["float32", "bfloat16", "int8"]
Call = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Contestant:
    """A library in one of its modes."""

    library: str
    setting: str  # mode of the library
    precision: Precision  # contestants of one precision are compared
    build: Callable[[], Call] = field(compare=False)  # the function to time: pixels [B, 3, H_px, W_px] to tokens

    @property
    def label(self) -> str:
        """The name in the table."""
        return ", ".join(part for part in (self.library, self.setting, self.precision) if part)


@dataclass
class Setup:
    """Model, input and files of a contest."""

    model: Backbone  # float32, on the device
    size: tuple[int, int]
    batch: int
    folder: Path  # for files of the model, each as large as the weights
    threads: int
    precisions: tuple[Precision, ...] = get_args(Precision)
    compile: bool = False  # also measure torch.compile
    reference: Path | None = None  # a checkout of Meta's code

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    @property
    def resized(self) -> bool:
        """Whether the input size makes the model resize its learned positions."""
        side, patch = self.model.config.position_grid, self.model.patch_size
        return side is not None and (side * patch, side * patch) != self.size

    def written(self, layout: Literal["hf", "meta", "timm"]) -> Path:
        """Writes the weights in a layout, once; returns the path."""
        path = self.folder / (layout + (".pth" if layout == "meta" else ""))
        if not path.exists():
            with quiet("dinov3_infer"):  # it logs what a layout cannot hold
                self.model.save_pretrained(path, layout)
        return path

    def onnx(self) -> Path:
        """Exports the model to ONNX, once; returns the path."""
        path = self.folder / "model.onnx"
        return path if path.exists() else self.model.export(path, size=self.size)


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Silences the warnings and progress bars of a library; exceptions pass."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
