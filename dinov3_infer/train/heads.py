"""Heads that training puts on the backbone, and that are discarded afterwards."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Linear
from .config import TrainConfig
from .distributed import mean_over

__all__ = ["ProjectionHead", "Standardise", "head_sizes", "linear_projection"]


def head_sizes(config: TrainConfig) -> dict[str, tuple[int, int, int]]:
    """(hidden width, bottleneck width, prototypes) of the head of each loss that has a weight."""
    dino = (config.head_hidden, config.head_bottleneck, config.dino_prototypes)
    ibot = (config.ibot_hidden or dino[0], config.ibot_bottleneck or dino[1], config.ibot_prototypes)
    sizes = {"dino_head": dino} if config.dino_weight else {}
    return sizes | ({"ibot_head": dino if config.shares_head else ibot} if config.ibot_weight else {})


class ProjectionHead(nn.Module):
    """Scores tokens against K prototypes: an MLP to a narrow vector, L2 normalisation, one dot product per prototype.

    Args:
        embed_dim: channels of a token, C.
        hidden_dim: width of the two hidden layers.
        bottleneck_dim: width of the narrow vector.
        num_prototypes: number of scores, K.
        unit_prototypes: keep the prototypes at length 1, as DINO v1; DINOv2 and DINOv3 leave them free.

    Source: DINO (arXiv 2104.14294), section 3.1; dinov3/layers/dino_head.py at 6876159.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        bottleneck_dim: int,
        num_prototypes: int,
        unit_prototypes: bool = False,
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            Linear(embed_dim, hidden_dim),
            nn.GELU(),
            Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            Linear(hidden_dim, bottleneck_dim),
        )
        # not `Linear`: oneDNN's copies of so wide a product would set the peak of the memory
        self.prototypes = nn.Linear(bottleneck_dim, num_prototypes, bias=False)
        self.unit_prototypes = unit_prototypes
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws the weights from a truncated normal distribution of std 0.02; biases are 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores [..., K] of tokens [..., C]."""
        narrow = self.mlp(tokens)
        narrow = F.normalize(narrow, dim=-1, eps=1e-6 if narrow.dtype == torch.float16 else 1e-12)
        if not self.unit_prototypes:
            return self.prototypes(narrow)  # type: ignore[no-any-return]
        return F.linear(narrow, F.normalize(self.prototypes.weight, dim=-1))


# Smallest variance: random weights give all images the same token, and a smaller one would magnify rounding errors.
LEAST = 1e-4


class Standardise(nn.Module):
    """Brings tokens to mean 0 and variance 1 per channel.

    Features of released backbones share a large common part, and differ little from image to image.  Without this
    layer new heads need hundreds of steps to separate images.

    Args:
        embed_dim: channels of a token, C.
        window: steps over which mean and variance are averaged, about; None for all steps, which suits a model that
            does not change.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, embed_dim: int, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.register_buffer("mean", torch.zeros(embed_dim, dtype=torch.float32))
        self.register_buffer("variance", torch.zeros(embed_dim, dtype=torch.float32))

    @torch.no_grad()
    def learn(self, tokens: Tensor, step: int) -> None:
        """Updates mean and variance with the tokens [..., C] of all processes at a step, counted from 0."""
        tokens = tokens.flatten(0, -2).to(self.mean.dtype)
        mean = mean_over(tokens)
        spread = mean_over((tokens - mean) ** 2)
        share = 1.0 / (step + 1 if self.window is None else min(step + 1, self.window))
        self.variance.lerp_(spread, share).add_((mean - self.mean) ** 2, alpha=share * (1.0 - share))
        self.mean.lerp_(mean, share)

    def forward(self, tokens: Tensor) -> Tensor:
        """Standardised tokens [..., C]."""
        return (tokens - self.mean) / self.variance.clamp(min=LEAST).sqrt()


def linear_projection(embed_dim: int, target_dim: int) -> nn.Linear:
    """A linear layer from the student's width to the teacher's: [..., embed_dim] to [..., target_dim]."""
    projection = Linear(embed_dim, target_dim)
    nn.init.trunc_normal_(projection.weight, std=embed_dim**-0.5)
    nn.init.zeros_(projection.bias)
    return projection
