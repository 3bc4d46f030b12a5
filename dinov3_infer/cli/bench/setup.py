"""What contestants have in common: a model, pixels, and its weights in every layout."""

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
    """One way to compute the tokens."""

    library: str
    setting: str  # of that library
    precision: Precision  # the class it competes in
    build: Callable[[], Call] = field(compare=False)  # gives what is timed: pixels [B, 3, H_px, W_px] to tokens

    @property
    def label(self) -> str:
        return ", ".join(part for part in (self.library, self.setting, self.precision) if part)


@dataclass
class Setup:
    """What all have in common."""

    model: Backbone  # float32, on the device
    size: tuple[int, int]
    batch: int
    folder: Path  # for files of the model; as large as the weights, several times
    threads: int
    precisions: tuple[Precision, ...] = get_args(Precision)
    compile: bool = False  # minutes
    reference: Path | None = None  # a checkout of Meta's code

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def resized(self) -> bool:
        """Whether learned positions are needed for another grid than their own."""
        side, patch = self.model.config.position_grid, self.model.patch_size
        return side is not None and (side * patch, side * patch) != self.size

    def written(self, layout: Literal["hf", "meta", "timm"]) -> Path:
        """The weights in the layout of a library."""
        path = self.folder / (layout + (".pth" if layout == "meta" else ""))
        if not path.exists():
            with quiet("dinov3_infer"):  # it tells what a layout has no place for, which nothing here needs
                self.model.save_pretrained(path, layout)
        return path

    def onnx(self) -> Path:
        """The model as a file for engines; `Backbone.export` has checked it."""
        path = self.folder / "model.onnx"
        return path if path.exists() else self.model.export(path, size=self.size)


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """No warnings of this library, and no bars; what goes wrong is raised."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
