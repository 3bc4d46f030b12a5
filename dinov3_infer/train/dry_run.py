"""A dry run: the settings and the memory of a run, without training."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .config import TrainConfig
from .distributed import device_of
from .loop import Run
from .method import split_batch
from .plots import draw_batch

__all__ = ["dry_run"]


def dry_run(config: TrainConfig) -> dict[str, Any]:
    """Computes one forward pass on two images and draws the first batch into `config.out`.

    Activations are counted as if none were recomputed, so the real peak is below the sum of the two sizes.

    Args:
        config: settings of the run.

    Returns:
        The settings; the number of images; the images of the first batch that could not be read; the learning rate;
        the number of trained parameters; GiB of weights with gradients and AdamW's moments; GiB of activations, at
        most; the first loss.

    Raises:
        InputError: the settings or the data are wrong.

    Example:
        >>> dry_run(TrainConfig(data=("photos/",), model="vits16", out="run"))["gib_of_activations_at_most"]
    """
    run = Run(dataclasses.replace(config, recompute="none", accumulate=1), device_of(config), dry=True)
    stream = run.stream()
    batch = next(stream)
    run.folder.mkdir(parents=True, exist_ok=True)
    draw_batch(batch, run.views[0][1], run.folder / "first_batch.png")
    few = split_batch(batch, max(1, len(batch.indices) // 2))[0]
    part = run.parts(few)[0]
    parameters = list(run.method.parameters())
    fixed = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with run.autocast(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        target = run.method.targets([part], 0)[0]
        terms = run.method.train()(part, target, config.steps)  # at the last step nothing is frozen
    learning = [p for p in parameters if p.requires_grad]
    weights = sum(p.nbytes for p in parameters) + 3 * sum(p.nbytes for p in learning)
    at_once = len(batch.indices) / config.accumulate
    return dataclasses.asdict(config) | {
        "images": len(run.data),
        "left_out": list(stream.broken.values()),  # reasons, for images of the first batch
        "learning_rate": config.lr,
        "trained_parameters": sum(p.numel() for p in learning),
        "gib_of_weights_gradients_and_moments": round(weights / 2**30, 3),
        "gib_of_activations_at_most": round(sum(kept.values()) / len(part.indices) * at_once / 2**30, 3),
        "first_loss": float(terms["loss"].detach()),
    }
