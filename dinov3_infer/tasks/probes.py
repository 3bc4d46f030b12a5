"""Classifiers on cached features: nearest neighbours, and linear layers after the two published protocols."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .classifier import CELLS, Probe, Vectors, as_features

__all__ = ["KNN", "LinearProbe", "LogisticProbe", "nearest"]

HELD_OUT = 0.1  # share of the examples that chooses a learning rate or a penalty


def nearest(queries: Vectors, bank: Vectors, k: int) -> tuple[Tensor, Tensor]:
    """The k vectors of a bank [N, C] most similar to each query [M, C].

    Returns cosines [M, k], best first, and row numbers [M, k].

    Raises: InputError for different widths, values that are not finite, or a bank of fewer than k vectors.
    """
    asked, known = as_features(queries, "queries"), as_features(bank, "bank")
    if asked.shape[1] != known.shape[1]:
        raise InputError(
            f"the queries have width {asked.shape[1]} and the bank {known.shape[1]}; use one model and one pooling"
        )
    if not 1 <= k <= len(known):
        raise InputError(f"k is {k} and the bank holds {len(known)} vectors; give a k from 1 to {len(known)}")
    known = F.normalize(known, dim=-1)
    parts = F.normalize(asked.to(known.device), dim=-1).split(max(1, CELLS // len(known)))
    found = [torch.topk(part @ known.T, k) for part in parts]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def weighted_votes(cosines: Tensor, classes: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Class probabilities [M, K] from the cosines [M, k] and classes [M, k] of neighbours."""
    votes = cosines.new_zeros(len(cosines), num_classes)
    return votes.scatter_add_(1, classes, (cosines / temperature).softmax(dim=-1))


@dataclass(repr=False, eq=False)
class KNN(Probe):
    """Classifies by the k nearest examples in cosine, weighted by a softmax over their cosines.

    Source: reference code of DINO, DINOv2 and DINOv3 (k of 10, 20, 100 or 200, temperature 0.07, class token).

    Example:
        >>> KNN(k=5).fit(bb.embed("photos/"), names).score(bb.embed("new/"), others)
    """

    k: int = 20
    temperature: float = 0.07

    names = ("features", "targets")
    shapes = ("N C", "N")

    def _fit(self, features: Tensor, targets: Tensor, num_classes: int) -> dict[str, Tensor]:
        if not 1 <= self.k <= len(features):
            raise InputError(
                f"k is {self.k} and there are {len(features)} examples; give a k from 1 to {len(features)}"
            )
        return {"features": F.normalize(features, dim=-1), "targets": targets}

    def _probabilities(self, features: Tensor) -> Tensor:
        targets = self.tensors["targets"]
        cosines, rows = nearest(features, self.tensors["features"], self.k)
        return weighted_votes(cosines, targets[rows], int(targets.max()) + 1, self.temperature)


@dataclass(repr=False, eq=False)
class LinearProbe(Probe):
    """A linear layer trained by SGD with momentum 0.9 and cosine decay to 0, for all learning rates in parallel.

    A tenth of the examples chooses the rate; then the layer is fitted to all examples with it.  Rates are stated for a
    batch size of 256 and scaled to `batch_size`.  After `fit`, `tensors["learning_rate"]` holds the chosen rate.

    Source: DINOv2 and DINOv3, reference code: 13 rates, 10 passes of 1,250 steps of 128 images per device, weights from
    N(0, 0.01).  The reference trains on augmented images; this probe trains on cached features.

    Example:
        >>> LinearProbe(steps=1000).fit(bb.embed("photos/"), names).predict_proba(bb.embed("new/"))  # [N, K]
    """

    learning_rates: Sequence[float] = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
    steps: int = 12_500
    batch_size: int = 128
    seed: int = 0

    names = ("weight", "bias", "learning_rate")
    shapes = ("K C", "K", "1")

    def _fit(self, features: Tensor, targets: Tensor, num_classes: int) -> dict[str, Tensor]:
        rates = torch.tensor(self.learning_rates, device=features.device, dtype=torch.float32)
        if len(rates) > 1:
            part, held = held_out(len(features), self.seed)
            weight, bias = self._train(features[part], targets[part], num_classes, rates)
            logits = torch.einsum("nc,lkc->lnk", features[held], weight) + bias[:, None]
            rates = rates[best(logits, targets[held])][None]
        weight, bias = self._train(features, targets, num_classes, rates)
        return {"weight": weight[0], "bias": bias[0], "learning_rate": rates}

    def _train(
        self, features: Tensor, targets: Tensor, num_classes: int, rates: Tensor
    ) -> tuple[Tensor, Tensor]:  # [L, K, C], [L, K] for L rates
        generator = torch.Generator("cpu").manual_seed(self.seed)
        weight = torch.randn(num_classes, features.shape[1] + 1, generator=generator, dtype=torch.float32, device="cpu")
        weight = weight.to(features.device) * 0.01
        weight[:, -1] = 0  # the bias
        weight = weight.repeat(len(rates), 1)  # [L * K, C + 1]
        momentum = torch.zeros_like(weight)
        scaled = rates.repeat_interleave(num_classes)[:, None]
        size = min(self.batch_size, len(features))
        for step in range(self.steps):
            start = step % (len(features) // size) * size
            if start == 0:
                order = torch.randperm(len(features), generator=generator, device="cpu").to(features.device)
            rows = order[start : start + size]
            x, y = F.pad(features[rows], (0, 1), value=1.0), targets[rows]
            error = (x @ weight.T).view(size, len(rates), num_classes).softmax(dim=-1)
            error[torch.arange(size, device=y.device), :, y] -= 1  # gradient of the cross-entropy
            momentum.mul_(0.9).add_(error.flatten(1).T @ x, alpha=1 / size)
            weight -= scaled * momentum * (size / 256 * (1 + math.cos(math.pi * step / self.steps)) / 2)
        found = weight.view(len(rates), num_classes, -1)
        return found[..., :-1], found[..., -1]


@dataclass(repr=False, eq=False)
class LogisticProbe(Probe):
    """Logistic regression with an L2 penalty, by L-BFGS in float64: minimises C * (sum of losses) + |weight|^2 / 2.

    With `C=None`, 45 values from 1e-6 to 1e5 are fitted to nine tenths of the examples; the value that is best on the
    other tenth is then fitted to all.  Each fit of the search starts from the last one and takes at most 100 steps.
    `tensors["strength"]` holds the chosen C.

    Source: DINOv2, reference code, which uses scikit-learn; the minimum is the same.

    Example:
        >>> LogisticProbe(C=1.0).fit(bb.embed("photos/"), names).predict(bb.embed("new/"))
    """

    C: float | None = None
    max_iter: int = 1000
    tolerance: float = 1e-6  # largest gradient of the mean loss at the end
    seed: int = 0

    names = ("weight", "bias", "strength")
    shapes = ("K C", "K", "1")

    def _fit(self, features: Tensor, targets: Tensor, num_classes: int) -> dict[str, Tensor]:
        mean = features.double().mean(dim=0)  # centring speeds up convergence; the bias absorbs it
        x = F.pad(features.double() - mean, (0, 1), value=1.0)
        chosen, start = self.C, x.new_zeros(num_classes, x.shape[1])
        if chosen is None:
            part, held = held_out(len(x), self.seed)
            sweep = torch.logspace(-6, 5, 45, dtype=torch.float64, device="cpu").tolist()
            fits = [start := self._minimum(x[part], targets[part], start, C, min(100, self.max_iter)) for C in sweep]
            number = best(torch.stack([x[held] @ fit.T for fit in fits]), targets[held])
            chosen, start = sweep[number], fits[number]
        both = self._minimum(x, targets, start, chosen, self.max_iter)
        weight, bias = both[:, :-1].float(), (both[:, -1] - both[:, :-1] @ mean).float()
        return {"weight": weight, "bias": bias, "strength": weight.new_tensor([chosen])}

    def _minimum(self, x: Tensor, targets: Tensor, start: Tensor, strength: float, max_iter: int) -> Tensor:
        weight = start.clone().requires_grad_()
        truth = F.one_hot(targets, len(start)).double()
        penalty = torch.ones_like(start) / (strength * len(x))
        penalty[:, -1] = 0  # no penalty on the bias
        solver = torch.optim.LBFGS(
            [weight], max_iter=max_iter, tolerance_grad=self.tolerance, tolerance_change=1e-14, history_size=10,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def loss() -> Tensor:
            logs = F.log_softmax(x @ weight.detach().T, dim=-1)
            weight.grad = (logs.exp() - truth).T @ x / len(x) + penalty * weight.detach()
            return -(truth * logs).sum() / len(x) + (penalty * weight.detach() ** 2).sum() / 2

        solver.step(loss)
        return weight.detach()


def held_out(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers [n] for training, and [m] for choosing: a tenth of the rows, at least one."""
    order = torch.randperm(count, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    held = max(1, round(count * HELD_OUT))
    return order[held:], order[:held]


def best(logits: Tensor, targets: Tensor) -> int:  # [L, N, K], [N]
    """The index of the candidate with the most hits; of equals, the one with the least cross-entropy.  Diverged
    candidates are never chosen.

    Raises: InputError if all candidates diverged.
    """
    hits = (logits.argmax(dim=-1) == targets).double().mean(dim=-1)
    losses = torch.stack([F.cross_entropy(one.double(), targets) for one in logits])
    if not losses.isfinite().any():
        raise InputError(
            "no learning rate converged, because the features are very large; scale them to length 1 first"
        )
    hits = hits.masked_fill(~losses.isfinite(), -1.0)
    return int(torch.where(hits == hits.max(), losses, torch.inf).argmin())
