"""Values that change in the course of a run, which are functions of its settings and the step; and which parameter
learns how fast.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .distributed import whole

__all__ = [
    "clip_gradients",
    "ema_momentum",
    "gram_weight",
    "learning_rate",
    "local_weight",
    "make_optimizer",
    "parameter_groups",
    "ramp",
    "renews_gram",
    "set_rates",
    "teacher_temperature",
    "warmup_cosine",
    "weight_decay",
]


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


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of what learns at full rate."""
    warmup = config.share(config.warmup_share)
    if config.warmup == "cosine" and step < warmup:
        return warmup_cosine(step, start=0.0, peak=0.0, end=config.lr, warmup=0, total=warmup)
    return warmup_cosine(step, start=0.0, peak=config.lr, end=config.lr * config.lr_end_share,
                         warmup=warmup, total=config.steps)  # fmt: skip


def weight_decay(config: TrainConfig, step: int) -> float:
    return warmup_cosine(step, start=0.0, peak=config.weight_decay, end=config.weight_decay_end,
                         warmup=0, total=config.steps)  # fmt: skip


def ema_momentum(config: TrainConfig, step: int) -> float:
    return warmup_cosine(step, start=0.0, peak=config.ema_momentum, end=config.ema_momentum_end,
                         warmup=0, total=config.steps)  # fmt: skip


def teacher_temperature(config: TrainConfig, step: int) -> float:
    peak = config.teacher_temperature
    return warmup_cosine(step, start=config.teacher_temperature_start, peak=peak, end=peak,
                         warmup=config.share(config.teacher_temperature_share), total=config.steps)  # fmt: skip


def _gram_ramp(config: TrainConfig, step: int) -> float:
    """0 before Gram anchoring begins, then half a cosine to 1."""
    begin = config.share(config.gram_begin_share)
    return warmup_cosine(step, start=0.0, peak=0.0, end=1.0,
                         warmup=begin, total=begin + config.share(config.gram_ramp_share))  # fmt: skip


def gram_weight(config: TrainConfig, step: int) -> float:
    return 0.0 if config.gram == "off" else config.gram_weight * _gram_ramp(config, step)


def local_weight(config: TrainConfig, step: int) -> float:
    ramp = 0.0 if config.gram == "off" else _gram_ramp(config, step)
    return config.local_weight * (1.0 + (config.gram_local_weight - 1.0) * ramp)


def renews_gram(config: TrainConfig, step: int) -> bool:
    """Whether the Gram teacher is copied from the moving average after this step: where anchoring begins, which counts
    as no renewal, and then at each of the renewals that there are.

    Source: dinov3/train/train.py at 6876159.
    """
    number, left = divmod(step + 1 - config.share(config.gram_begin_share), config.gram_renew_steps)
    return left == 0 and 0 <= number <= (config.gram_renewals or config.steps)


def parameter_groups(student: nn.ModuleDict, config: TrainConfig) -> list[dict[str, Any]]:
    """Parameters that learn alike, together.

    The last block learns at `layer_decay` of the full rate, each one before it at that share of the next; what comes
    before the blocks follows on, the patch embedding at `patch_lr` of that.  Heads learn at `head_lr` times the full
    rate.  Biases, norms and gammas do not decay.

    Source: dinov3/train/param_groups.py at 6876159.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    depth = len(student["backbone"].blocks)  # type: ignore[arg-type]
    for part, module in student.items():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            rate = _rate(name, depth, config) if part == "backbone" else config.head_lr
            decays = not (name.endswith("bias") or "norm" in name or "gamma" in name)
            key = (part == "backbone", "prototypes" in name, rate, decays)
            group = groups.setdefault(
                key, dict(params=[], rate=rate, decays=decays, backbone=key[0], prototypes=key[1])
            )
            group["params"].append(parameter)
    return list(groups.values())


def _rate(name: str, depth: int, config: TrainConfig) -> float:
    if name.startswith("blocks."):
        layer = int(name.split(".")[1]) + 1
    else:
        layer = depth + 1 if "norm" in name else 0
    rate: float = config.layer_decay ** (depth + 1 - layer)
    return rate * config.patch_lr if name.startswith("patch_embed") else rate


def make_optimizer(student: nn.ModuleDict, config: TrainConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(student, config), lr=config.lr, betas=config.betas, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> float:
    """Learning rate and weight decay of every group at this step; returns the full rate."""
    rate, decay = learning_rate(config, step), weight_decay(config, step)
    thaw = ramp(step, config.share(config.freeze_share), config.share(config.ramp_share))
    for group in optimizer.param_groups:
        held = group["prototypes"] and step < config.share(config.freeze_prototypes_share)
        group["lr"] = 0.0 if held else rate * group["rate"] * (thaw if group["backbone"] else 1.0)
        group["weight_decay"] = decay if group["decays"] else 0.0
    return rate


def clip_gradients(student: nn.ModuleDict, limit: float) -> dict[str, Tensor]:
    """Scales the gradients of each part down to a norm of at most `limit`; the norms before, by part."""
    norms = {}
    for part, module in student.items():
        found: Iterable[Tensor] = [p for p in module.parameters() if p.grad is not None]
        norms[part] = whole(nn.utils.clip_grad_norm_(found, limit))
    return norms
