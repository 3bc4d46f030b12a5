"""The two forms of the published schedules, and the table of a published recipe."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Row = tuple[Any, str]  # (value, lines of the source)
Schedules = dict[str, np.ndarray]


@dataclass(frozen=True)
class Recipe:
    name: str  # of a file in examples/configs, or of a preset
    source: str  # file of the line numbers, unless another one is named
    settings: dict[str, Row]
    model: dict[str, Row]  # fields of ViTConfig
    others: dict[str, str]  # facts without a setting, with their lines in the source
    schedules: Callable[[], Schedules]
    equal_from: int = 0  # first step with the source's schedules; before it only the new heads are trained
    tolerance: dict[str, float] = field(default_factory=dict)  # largest difference, as a share of the peak


# --- the two forms of a schedule ---------------------------------------------------------------------------------


def cosine(first: float, last: float, angles: np.ndarray) -> np.ndarray:
    return last + (first - last) * (1 + np.cos(angles)) / 2


def v2(start: float, peak: float, end: float, warmup: int, total: int, falls: int | None = None) -> np.ndarray:
    """DINOv3 with a block `schedules`: a line without its last point, a cosine with both ends, a constant.

    dinov3/train/cosine_lr_scheduler.py (linear_warmup_cosine_decay) at 6876159.
    """
    falls = total - warmup if falls is None else falls
    parts = np.linspace(start, peak, warmup, endpoint=False), cosine(peak, end, np.linspace(0, math.pi, falls))
    return np.concatenate([*parts, np.full(total - warmup - falls, float(end))])


def v1(base: float, final: float, total: int, warmup: int = 0, start: float = 0.0) -> np.ndarray:
    """DINO, DINOv2 and DINOv3 without that block: a line with both ends, a cosine that stops before its end.

    dinov3/train/cosine_lr_scheduler.py (CosineScheduler) at 6876159; utils.py (cosine_scheduler) of dino.
    """
    steps = total - warmup
    return np.concatenate([np.linspace(start, base, warmup), cosine(base, final, math.pi * np.arange(steps) / steps)])


def held(rate: np.ndarray, steps: int) -> np.ndarray:
    return np.where(np.arange(len(rate)) < steps, 0.0, rate)


def rising(start: float, end: float, warmup: int, total: int) -> np.ndarray:
    """The teacher's temperature in the form v1: a line, then constant."""
    return np.concatenate([np.linspace(start, end, warmup), np.full(total - warmup, end)])


def of_v1(rate: float, last: float, momentum: float, epoch: int, temperature: np.ndarray | None = None) -> Schedules:
    """100 epochs: 10 of warm-up, 1 with fixed prototypes, 30 until the temperature is 0.07."""
    total = 100 * epoch
    lr = v1(rate, last, total, 10 * epoch)
    return {
        "learning_rate": lr,
        "prototypes": held(lr, epoch),
        "weight_decay": v1(0.04, 0.4, total),
        "ema_momentum": v1(momentum, 1.0, total),
        "teacher_temperature": rising(0.04, 0.07, 30 * epoch, total) if temperature is None else temperature,
    }


def of_7b(peak: float, momentum: float, first: int, last: int) -> Schedules:
    """Steps of the 7B's run from `first` on: warm-up until 100,000, fixed prototypes until 5,000."""
    lr = v2(0.0, peak, peak, 100_000, last)
    found = {
        "learning_rate": lr,
        "prototypes": held(lr, 5000),
        "weight_decay": np.full(last, 0.04),
        "ema_momentum": np.full(last, momentum),
        "teacher_temperature": v2(0.04, 0.07, 0.07, 100_000, last),
    }
    return {name: values[first:] for name, values in found.items()}
