"""Values that change in the course of a run, as functions of the step."""

import math

__all__ = ["ramp", "warmup_cosine"]


def warmup_cosine(
    step: int,
    *,
    start: float,
    peak: float,
    end: float,
    warmup: int,  # steps
    total: int,  # steps
) -> float:
    """From `start` straight to `peak` in `warmup` steps, by a cosine to `end` at the last of `total`, then constant.

    With `end` equal to `peak` this is a warm-up and a constant.

    Source: dinov3/train/cosine_lr_scheduler.py at 6876159 (linear_warmup_cosine_decay).
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    last = total - 1 - warmup
    if last <= 0 or step - warmup >= last:
        return end
    return end + 0.5 * (peak - end) * (1.0 + math.cos(math.pi * (step - warmup) / last))


def ramp(
    step: int,
    begin: int,  # 0 before this step
    length: int,  # steps until 1
) -> float:
    """0, then straight to 1."""
    if step < begin:
        return 0.0
    return min(1.0, (step - begin + 1) / (length + 1))
