"""The two forms of the published schedules, and what a table of a published recipe holds."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Row = tuple[Any, str]  # value, lines of the source
Schedules = dict[str, np.ndarray]


@dataclass(frozen=True)
class Recipe:
    name: str  # of a file in examples/configs, or of a preset
    source: str  # what the numbers of lines are of, where no other file is named
    settings: dict[str, Row]
    model: dict[str, Row]  # fields of ViTConfig
    others: dict[str, str]  # what no setting says, and where the source says it
    schedules: Callable[[], Schedules]
    equal_from: int = 0  # the step from which the schedules are the source's; before, new heads learn by themselves
    tolerance: dict[str, float] = field(default_factory=dict)  # of a schedule, in parts of its peak


# --- the two forms of a schedule ---------------------------------------------------------------------------------


def cosine(first: float, last: float, angles: np.ndarray) -> np.ndarray:
    return last + (first - last) * (1 + np.cos(angles)) / 2


def v2(start: float, peak: float, end: float, warmup: int, total: int, falls: int | None = None) -> np.ndarray:
    """DINOv3 with a block `schedules`: a line that leaves its last point out, a cosine with both ends, a constant.

    dinov3/train/cosine_lr_scheduler.py (linear_warmup_cosine_decay) at 6876159.
    """
    falls = total - warmup if falls is None else falls
    parts = np.linspace(start, peak, warmup, endpoint=False), cosine(peak, end, np.linspace(0, math.pi, falls))
    return np.concatenate([*parts, np.full(total - warmup - falls, float(end))])


def v1(base: float, final: float, total: int, warmup: int = 0, start: float = 0.0) -> np.ndarray:
    """DINO, DINOv2 and DINOv3 without that block: a line with both ends, a cosine that does not reach its end.

    dinov3/train/cosine_lr_scheduler.py (CosineScheduler) at 6876159; utils.py (cosine_scheduler) of dino.
    """
    steps = total - warmup
    return np.concatenate([np.linspace(start, base, warmup), cosine(base, final, math.pi * np.arange(steps) / steps)])


def held(rate: np.ndarray, steps: int) -> np.ndarray:
    return np.where(np.arange(len(rate)) < steps, 0.0, rate)


def rising(start: float, end: float, warmup: int, total: int) -> np.ndarray:
    """Of the teacher's temperature where the form is v1: constant after the line."""
    return np.concatenate([np.linspace(start, end, warmup), np.full(total - warmup, end)])


def of_v1(rate: float, last: float, momentum: float, epoch: int, temperature: np.ndarray | None = None) -> Schedules:
    """100 epochs: 10 of warm-up, 1 with the prototypes held, 30 until the temperature is 0.07."""
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
    """Steps of the run of the 7B from `first` on: warm-up until 100,000, prototypes held until 5,000."""
    lr = v2(0.0, peak, peak, 100_000, last)
    found = {
        "learning_rate": lr,
        "prototypes": held(lr, 5000),
        "weight_decay": np.full(last, 0.04),
        "ema_momentum": np.full(last, momentum),
        "teacher_temperature": v2(0.04, 0.07, 0.07, 100_000, last),
    }
    return {name: values[first:] for name, values in found.items()}
