"""What stands on the backbone in training and is thrown away afterwards."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Linear
from .distributed import mean_over

__all__ = ["ProjectionHead", "Standardise", "linear_projection"]


class ProjectionHead(nn.Module):
    """Tokens -> scores of K prototypes: an MLP to a narrow vector, its direction, one dot product per prototype.

    DINO v1 keeps the prototypes at length 1 (`unit_prototypes`); DINOv2 and DINOv3 leave them free.

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
        # not by oneDNN, whose copies of so wide a product would be the peak of the memory
        self.prototypes = nn.Linear(bottleneck_dim, num_prototypes, bias=False)
        self.unit_prototypes = unit_prototypes
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:  # [..., C]
        """[..., K]."""
        narrow = self.mlp(tokens)
        narrow = F.normalize(narrow, dim=-1, eps=1e-6 if narrow.dtype == torch.float16 else 1e-12)
        if not self.unit_prototypes:
            return self.prototypes(narrow)  # type: ignore[no-any-return]
        return F.linear(narrow, F.normalize(self.prototypes.weight, dim=-1))


# of a variance: random weights give all images the same token, and their rounding errors are nothing to magnify
LEAST = 1e-4


class Standardise(nn.Module):
    """Tokens -> tokens of mean 0 and variance 1 per channel, by the mean and variance of the last `window` steps or so,
    or of all steps, where the model that makes the tokens does not change.

    What released features have in common is much larger than what tells two images apart; new heads take hundreds of
    steps to see past it.
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
        """Folds the tokens [..., C] of all processes at step 0, 1, ... into mean and variance."""
        tokens = tokens.flatten(0, -2).to(self.mean.dtype)
        mean = mean_over(tokens)
        spread = mean_over((tokens - mean) ** 2)
        share = 1.0 / (step + 1 if self.window is None else min(step + 1, self.window))
        self.variance.lerp_(spread, share).add_((mean - self.mean) ** 2, alpha=share * (1.0 - share))
        self.mean.lerp_(mean, share)

    def forward(self, tokens: Tensor) -> Tensor:  # [..., C]
        return (tokens - self.mean) / self.variance.clamp(min=LEAST).sqrt()


def linear_projection(embed_dim: int, target_dim: int) -> nn.Linear:
    """From a student's width to its teacher's."""
    projection = Linear(embed_dim, target_dim)
    nn.init.trunc_normal_(projection.weight, std=embed_dim**-0.5)
    nn.init.zeros_(projection.bias)
    return projection
