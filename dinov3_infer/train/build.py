"""Builds the model of a run: student, teachers and heads, on the device."""

import dataclasses

import torch

from ..backbone import Backbone, ViTBackbone
from ..errors import InputError, UnsupportedError
from ..zoo import OWN
from .blocks import wrap_blocks
from .config import TrainConfig
from .draws import generator
from .method import Method

__all__ = ["build_method"]


def build_method(config: TrainConfig, device: torch.device, backbone: Backbone | None = None) -> Method:
    """Builds student, teachers and heads with the same random numbers in every process.

    Args:
        config: settings of the run.
        device: where the model is put.
        backbone: model to start from, trained in place; None to load or initialise `config.model`.

    Returns:
        The model, in float32, or in float64 with `config.precision="float64"`.

    Raises:
        InputError: the weights have less than 32 bits, or a setting does not fit the model.
        UnsupportedError: the model is no vision transformer of RGB images.
    """
    teacher = Backbone.from_pretrained(config.teacher, device=device) if config.distils else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.seed, 0, "weights").initial_seed() % 2**63)
        if backbone is None and config.from_scratch:
            backbone = Backbone.from_config(config.model)
            if backbone.info is not None and teacher is None:  # a teacher's licence may apply to what it taught
                backbone.info = dataclasses.replace(backbone.info, licence=OWN)
        elif backbone is None:
            backbone = Backbone.from_pretrained(config.model, device="cpu")
        elif backbone.main_weight.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"training needs float32 weights, since small steps are lost in {backbone.main_weight.dtype}; load the "
                "model with dtype='auto' (precision='bfloat16' still computes in bfloat16)"
            )
        if backbone.info is not None and backbone.info.licence != OWN:
            backbone.info = dataclasses.replace(backbone.info, derived=True)
        if not isinstance(backbone, ViTBackbone) or backbone.preprocess.channels != 3:
            raise UnsupportedError(
                f"training supports vision transformers of RGB images, not a {backbone.summary()}; choose another model"
            )
        method = Method(config, backbone.to(device), teacher)
    wrap_blocks(method.backbone, config.compile, config.recompute)
    wrap_blocks(method.average, config.compile, "none")
    for other in (method.teacher, method.gram_teacher):
        if other is not None:
            wrap_blocks(other, False, "none")
    if device.type == "cpu" and config.compile and config.precision == "bfloat16":  # torch's fused attention is slower
        for compiled in (method.backbone, method.average):
            compiled.set_attention("eager")
    return method.to(device, torch.float64 if config.precision == "float64" else torch.float32)
