"""What stands on the backbone in training and is thrown away afterwards."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ProjectionHead", "linear_projection"]


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
            nn.Linear(embed_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
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


def linear_projection(embed_dim: int, target_dim: int) -> nn.Linear:
    """From a student's width to its teacher's."""
    projection = nn.Linear(embed_dim, target_dim)
    nn.init.trunc_normal_(projection.weight, std=embed_dim**-0.5)
    nn.init.zeros_(projection.bias)
    return projection
