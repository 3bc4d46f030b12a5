"""A training step of a tiny model, in float64."""

import torch
from torch import Tensor

from dinov3_infer import Backbone, ViTConfig
from dinov3_infer.train.config import TrainConfig
from dinov3_infer.train.method import Method
from dinov3_infer.train.views import Batch

TINY = ViTConfig(24, 2, 2, 48)
SMALL = dict(
    batch_size=4, num_local=2, global_px=64, local_px=32, dino_prototypes=16, ibot_prototypes=12, head_hidden=20,
    head_bottleneck=8, spread_group=2, freeze_share=0.0, ramp_share=0.0, rope_rescale=1.0, steps=10,
)  # fmt: skip


def settings(**changes) -> TrainConfig:
    return TrainConfig(**(SMALL | changes))


def tiny(seed: int = 0, config: ViTConfig = TINY, layerscale: float = 0.5) -> Backbone:
    """A tiny model with random weights, large enough that each block changes the tokens."""
    backbone = Backbone.from_config(config, seed=seed).double()
    for name, parameter in backbone.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.constant_(parameter, layerscale)
        elif "token" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
    return backbone


def make(config: TrainConfig, teacher: Backbone | None = None) -> Method:
    torch.manual_seed(3)
    method = Method(config, tiny(), teacher).double().train()
    with torch.no_grad():  # the moving average differs from the student, as it does later in a run
        for parameter in method.ema.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, dtype=parameter.dtype))
    return method


def batch_of(count: int = 4, config: TrainConfig | None = None, gram_px: int | None = None) -> Batch:
    draw = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    masks = torch.rand(2 * count, 16, generator=draw) < 0.4
    masks[1] = False
    gram = None if gram_px is None else noise(2 * count, 3, gram_px, gram_px)
    num_local = 2 if config is None else config.num_local
    return Batch(noise(2 * count, 3, 64, 64), noise(num_local * count, 3, 32, 32), gram, masks, torch.arange(count))


def terms_of(method: Method, batch: Batch, step: int = 0) -> dict[str, Tensor]:
    return method(batch, method.targets([batch], step)[0], step)
