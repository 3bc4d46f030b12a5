"""Schedules, as functions of settings and step, and the optimiser with its parameter groups."""

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
    warmup: int,
    total: int,
) -> float:
    """A linear warm-up, then half a cosine.

    Args:
        step: number of the step, from 0.
        start: value at step 0.
        peak: value after `warmup` steps.
        end: value at step `total` - 1 and after it.
        warmup: steps of the linear part.
        total: steps of the whole schedule.

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
    begin: int,  # the value is 0 before this step
    length: int,  # steps from 0 to 1
) -> float:
    """A linear ramp from 0 to 1."""
    if step < begin:
        return 0.0
    return min(1.0, (step - begin + 1) / (length + 1))


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of parameters whose factor is 1 (see `parameter_groups`)."""
    warmup = config.share(config.warmup_share)
    if config.warmup == "cosine" and step < warmup:
        return warmup_cosine(step, start=0.0, peak=0.0, end=config.lr, warmup=0, total=warmup)
    return warmup_cosine(step, start=0.0, peak=config.lr, end=config.lr * config.lr_end_share,
                         warmup=warmup, total=config.steps)  # fmt: skip


def weight_decay(config: TrainConfig, step: int) -> float:
    """Weight decay at a step: half a cosine between its two settings."""
    return warmup_cosine(step, start=0.0, peak=config.weight_decay, end=config.weight_decay_end,
                         warmup=0, total=config.steps)  # fmt: skip


def ema_momentum(config: TrainConfig, step: int) -> float:
    """Momentum of the moving average at a step: half a cosine between its two settings."""
    return warmup_cosine(step, start=0.0, peak=config.ema_momentum, end=config.ema_momentum_end,
                         warmup=0, total=config.steps)  # fmt: skip


def teacher_temperature(config: TrainConfig, step: int) -> float:
    """Softmax temperature of the teacher at a step: a linear warm-up, then constant."""
    peak = config.teacher_temperature
    return warmup_cosine(step, start=config.teacher_temperature_start, peak=peak, end=peak,
                         warmup=config.share(config.teacher_temperature_share), total=config.steps)  # fmt: skip


def _gram_ramp(config: TrainConfig, step: int) -> float:
    """0 until Gram anchoring begins, then half a cosine to 1."""
    begin = config.share(config.gram_begin_share)
    return warmup_cosine(step, start=0.0, peak=0.0, end=1.0,
                         warmup=begin, total=begin + config.share(config.gram_ramp_share))  # fmt: skip


def gram_weight(config: TrainConfig, step: int) -> float:
    """Weight of the Gram loss at a step."""
    return 0.0 if config.gram == "off" else config.gram_weight * _gram_ramp(config, step)


def local_weight(config: TrainConfig, step: int) -> float:
    """Factor of the local crops' part of the DINO loss at a step."""
    ramp = 0.0 if config.gram == "off" else _gram_ramp(config, step)
    return config.local_weight * (1.0 + (config.gram_local_weight - 1.0) * ramp)


def renews_gram(config: TrainConfig, step: int) -> bool:
    """Whether the Gram teacher is copied from the moving average after this step.

    It is copied when anchoring begins, which does not count as a renewal, and then at each renewal.

    Source: dinov3/train/train.py at 6876159.
    """
    number, left = divmod(step + 1 - config.share(config.gram_begin_share), config.gram_renew_steps)
    return left == 0 and 0 <= number <= (config.gram_renewals or config.steps)


def parameter_groups(student: nn.ModuleDict, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups the trained parameters by learning rate and weight decay.

    The learning rate of a group is a factor times that of the step.  With d = `layer_decay` and N blocks, the factor is
    1 for the final norm, d for the last block, d^2 for the one before it, d^N for the first block and d^(N + 1) for
    class, register and mask tokens.  It is `patch_lr` * d^(N + 1) for the patch embedding and `head_lr` for heads.
    Biases, norms and gammas have no weight decay.

    Returns:
        Groups for `torch.optim`, each with its factor as "rate", and "decays", "backbone" and "prototypes" as flags.

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
    """AdamW over the parameter groups of the student."""
    return torch.optim.AdamW(parameter_groups(student, config), lr=config.lr, betas=config.betas, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> float:
    """Sets learning rate and weight decay of every group for a step; returns the learning rate of factor 1."""
    rate, decay = learning_rate(config, step), weight_decay(config, step)
    thaw = ramp(step, config.share(config.freeze_share), config.share(config.ramp_share))
    for group in optimizer.param_groups:
        held = group["prototypes"] and step < config.share(config.freeze_prototypes_share)
        group["lr"] = 0.0 if held else rate * group["rate"] * (thaw if group["backbone"] else 1.0)
        group["weight_decay"] = decay if group["decays"] else 0.0
    return rate


def clip_gradients(student: nn.ModuleDict, limit: float) -> dict[str, Tensor]:
    """Clips the gradient norm of each part of the student to `limit`; returns the norms before, [] each, by part."""
    norms = {}
    for part, module in student.items():
        found: Iterable[Tensor] = [p for p in module.parameters() if p.grad is not None]
        norms[part] = whole(nn.utils.clip_grad_norm_(found, limit))
    return norms
