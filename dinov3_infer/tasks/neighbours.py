"""Exact cosine neighbours over vectors on disk: search, and groups of near-duplicates.

Source: DINOv2 paper (arXiv 2304.07193), section 3 and appendix A: pairs above a cosine, connected components, one image
of each kept; components that touch an evaluation set are dropped.  Whitening as in copy detection: Pizzi et al. (arXiv
2202.10261), section 4.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..features.disk.store import BLOCK, Store
from ..features.vectors import Array

__all__ = ["THRESHOLDS", "Duplicates", "duplicates", "search"]

# Cosine above which two images are duplicates, with and without whitening (tests/benchmarks/records/curation.json).
THRESHOLDS = {True: 0.75, False: 0.98}
TILE = 4096  # rows that are compared with one block


def search(
    store: Store,
    queries: Array,  # [Q, C]
    k: int,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """The `k` images most similar to each query: cosines [Q, k], best first, and numbers [Q, k] int64.

    Raises: InputError for queries of another width.
    """
    if queries.shape[1] != store.width:
        raise InputError(
            f"queries have width {queries.shape[1]} and '{store.path}' {store.width}; use one model and one pooling"
        )
    asked = torch.nn.functional.normalize(torch.from_numpy(queries).float(), dim=1).to(device)
    scores = torch.empty(len(asked), 0, dtype=torch.float32, device=device)
    numbers = torch.empty(len(asked), 0, dtype=torch.int64, device=device)
    for first, block in store.blocks():
        found = (asked @ torch.from_numpy(block).to(device).T).nan_to_num(nan=-torch.inf)
        top = found.topk(min(k, found.shape[1]), dim=1)
        scores, numbers = torch.cat((scores, top.values), 1), torch.cat((numbers, top.indices + first), 1)
        kept = scores.topk(min(k, scores.shape[1]), dim=1)
        scores, numbers = kept.values, numbers.gather(1, kept.indices)
    return scores.cpu(), numbers.cpu()


@dataclass(frozen=True)
class Duplicates:
    """The result of `duplicates`."""

    group: Array  # [N] int64: number of the first image in the group of each image
    foreign: Array  # [N] bool: images of a group that touches the other set

    def kept(self, store: Store) -> Array:
        """Numbers of the images to keep, [n] int64: the first readable image of each group that is not foreign."""
        return np.flatnonzero(store.good & (self.group == np.arange(len(self.group))) & ~self.foreign)


def duplicates(
    store: Store,
    threshold: float | None = None,  # cosine; None: 0.75 with whitening, 0.98 without
    against: Store | None = None,
    against_threshold: float | None = None,  # None: as `threshold`
    whiten: bool = True,
    device: torch.device | str = "cpu",
) -> Duplicates:
    """Groups images that are connected by cosines above `threshold`, and marks groups that touch the set `against`.
    Equal vectors are always connected.

    Args:
        store: the vectors.
        threshold: cosine above which two images are duplicates (default: 0.75 with whitening, 0.98 without).
        against: vectors of another set, such as a test set.
        against_threshold: threshold for `against` (default: `threshold`).
        whiten: whiten by the mean and covariance of the store.  The vectors of a model share most of their direction;
            whitening makes the small differences between similar images as large as the rest (default: True).
        device: where cosines are computed (default: "cpu").

    Returns:
        `Duplicates`.  Every pair is compared, in tiles: the time grows with the square of the number of images, the
        memory does not.

    Raises:
        InputError: the stores were made with different settings, or a threshold is not between -1 and 1.
    """
    threshold = THRESHOLDS[whiten] if threshold is None else threshold
    limit = threshold if against_threshold is None else against_threshold
    for cosine in (threshold, limit):
        if not -1 <= cosine <= 1:
            raise InputError(f"a threshold is a cosine from -1 to 1, got {cosine:g}; give for example 0.75")
    if against is not None:
        store.check_comparable(against)
    parent = np.arange(len(store))
    change = _whitening(store, device) if whiten else None
    for start, block in _blocks(store, BLOCK, change, device):
        for first, others in _blocks(store, TILE, change, device):
            if first > start + len(block):
                break
            left, right = _above(others, block, threshold)
            left, right = left + first, right + start
            _join(parent, left[left < right], right[left < right])
    prints = _prints(store)
    rows = np.flatnonzero(store.good)
    _, firsts, which = np.unique(prints[rows], return_index=True, return_inverse=True)
    _join(parent, rows[firsts][which], rows)
    group = _roots(parent, parent)
    foreign = np.zeros(len(store), bool)
    if against is not None:
        for _, block in _blocks(against, BLOCK, change, device):
            for first, others in _blocks(store, TILE, change, device):
                found, _ = _above(others, block, limit)
                foreign[group[found + first]] = True
        equal = np.isin(prints, _prints(against)[against.good]) & store.good
        foreign[group[equal]] = True
        foreign = foreign[group]
    return Duplicates(group, foreign)


def _prints(store: Store) -> Array:
    """[N] uint64, equal for equal vectors; two different vectors collide with probability 2^-63."""
    keys = np.random.default_rng(0).integers(1, 2**63, store.width, np.uint64) * 2 + 1
    found = np.zeros(len(store), np.uint64)
    for first, rows in store.blocks():
        bits = (rows + 0.0).view(np.uint32)  # turns -0.0 into 0.0
        found[first : first + len(rows)] = (bits * keys).sum(1, dtype=np.uint64)
    return found


def _whitening(store: Store, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Mean [C] and matrix [C, C] that give all directions the same variance, except those with nearly none."""
    total = torch.zeros(store.width, dtype=torch.float64, device=device)
    products = torch.zeros(store.width, store.width, dtype=torch.float64, device=device)
    count = 0
    for first, rows in store.blocks():
        block = torch.from_numpy(rows[store.good[first : first + len(rows)]]).to(device)
        total += block.sum(0, dtype=torch.float64)
        products += (block.T @ block).double()
        count += len(block)
    mean = total / max(1, count)
    values, vectors = torch.linalg.eigh(products / max(1, count) - mean.outer(mean))
    values = values.clamp(min=0)
    values += (
        values.mean() * (0.1 + store.width / max(1, count)) + 1e-12
    )  # with few images the directions are uncertain
    return mean.float(), (vectors / values.sqrt()).float()


def _blocks(
    store: Store, rows: int, change: tuple[Tensor, Tensor] | None, device: torch.device | str
) -> Iterator[tuple[int, Tensor]]:
    for first, block in store.blocks(rows):
        found = torch.from_numpy(block).to(device)
        if change is not None:
            found = torch.nn.functional.normalize((found - change[0]) @ change[1], dim=1)
        yield first, found


def _above(one: Tensor, other: Tensor, threshold: float) -> tuple[Array, Array]:
    """Rows of the pairs above the threshold; NaN is never above it."""
    left, right = (one @ other.T > threshold).nonzero(as_tuple=True)
    return left.cpu().numpy(), right.cpu().numpy()


def _roots(parent: Array, rows: Array) -> Array:
    """The lowest number of the group of each row."""
    while True:
        above = parent[rows]
        if np.array_equal(above, rows):
            return above
        rows = above


def _join(parent: Array, left: Array, right: Array) -> None:
    """Joins all pairs at once; in each round the higher root gets the lower root as its parent."""
    while len(left):
        left, right = _roots(parent, left), _roots(parent, right)
        apart = left != right
        left, right = left[apart], right[apart]
        np.minimum.at(parent, np.maximum(left, right), np.minimum(left, right))
