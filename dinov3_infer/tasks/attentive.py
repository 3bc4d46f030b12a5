"""A classifier that learns which patches to look at."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .classifier import Probe
from .fitted import descend
from .probes import best, held_out

__all__ = ["AttentiveProbe"]


@dataclass(repr=False, eq=False)
class AttentiveProbe(Probe):
    """A classifier with one learned query that attends to the patches [N, P, C] with several heads.

    A norm and a linear layer follow.

    For a video, concatenate the patches of all its frames.  Training uses AdamW with warm-up and cosine decay, once for
    each learning rate.  A tenth of the examples chooses the rate; the final probe is trained on all examples.

    The product of query and key projection is stored as one matrix, a direction in feature space for each head, and
    values are projected after the average.  This computes the same functions as multi-head attention with one query, at
    about a hundredth of its cost.

    Source: attentive probing as in CAE (arXiv 2202.03026), section 4, and V-JEPA.

    Example:
        >>> AttentiveProbe().fit(bb.embed("photos/", kind="patches"), names)
    """

    num_heads: int = 8
    learning_rates: Sequence[float] = (3e-4, 1e-3, 3e-3)
    epochs: int = 20
    batch_size: int = 128
    weight_decay: float = 0.05
    seed: int = 0

    dims = 3
    names = ("query", "value", "norm", "shift", "weight", "bias", "learning_rate")
    shapes = ("H C", "H D C", "C", "C", "K C", "K", "1")

    def _fit(self, features: Tensor, targets: Tensor, num_classes: int) -> dict[str, Tensor]:
        if features.shape[-1] % self.num_heads:
            raise InputError(
                f"{features.shape[-1]} channels do not split into {self.num_heads} heads; give a divisor as num_heads="
            )
        rate = self.learning_rates[0]
        if len(self.learning_rates) > 1:
            part, held = held_out(len(features), self.seed)
            logits = []
            for one in self.learning_rates:
                self.tensors = self._train(features[part], targets[part], num_classes, one)
                logits.append(self._proba(features[held]).log())
            rate = self.learning_rates[best(torch.stack(logits), targets[held])]
        found = self._train(features, targets, num_classes, rate)
        return found | {"learning_rate": found["bias"].new_tensor([rate])}

    def _train(self, features: Tensor, targets: Tensor, num_classes: int, rate: float) -> dict[str, Tensor]:
        width, heads = features.shape[-1], self.num_heads
        generator = torch.Generator().manual_seed(self.seed)

        def drawn(*shape: int, std: float) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * std).to(
                features.device
            )

        made = {
            "query": drawn(heads, width, std=0.02),
            "value": drawn(heads, width // heads, width, std=width**-0.5),
            "norm": torch.ones(width, dtype=torch.float32, device=features.device),
            "shift": torch.zeros(width, dtype=torch.float32, device=features.device),
            "weight": drawn(num_classes, width, std=0.01),
            "bias": torch.zeros(num_classes, dtype=torch.float32, device=features.device),
        }
        for tensor in made.values():
            tensor.requires_grad_()
        batches = (
            rows
            for _ in range(self.epochs)
            for rows in torch.randperm(len(features), generator=generator, device="cpu")
            .to(features.device)
            .split(self.batch_size)
        )

        def loss() -> Tensor:
            rows = next(batches)
            return F.cross_entropy(_logits(features[rows].float(), made), targets[rows])

        decays = [self.weight_decay if tensor.ndim > 1 else 0.0 for tensor in made.values()]
        steps = self.epochs * math.ceil(len(features) / self.batch_size)
        descend(list(made.values()), decays, steps, rate, 0.1, loss)
        return {name: tensor.detach() for name, tensor in made.items()}

    def _probabilities(self, features: Tensor) -> Tensor:
        return _logits(features, self.tensors).softmax(dim=-1)


def _logits(tokens: Tensor, made: dict[str, Tensor]) -> Tensor:  # [B, P, C] -> [B, K]
    """Per head: a softmax over the patches of their product with its direction, and the projected weighted mean."""
    heads, width = made["query"].shape
    attention = (tokens @ made["query"].T * (width // heads) ** -0.5).softmax(dim=1)  # [B, P, H]
    seen = attention.mT @ tokens  # [B, H, C]
    pooled = torch.einsum("bhc,hdc->bhd", seen, made["value"]).flatten(1)
    return F.linear(F.layer_norm(pooled, (width,), made["norm"], made["shift"]), made["weight"], made["bias"])
