"""Exact cosine neighbours over vectors on disk: search, and groups of near-duplicates.

Source: DINOv2 paper (arXiv 2304.07193), section 3 and appendix A: pairs above a cosine, connected components, one of
each kept; components that touch an evaluation set dropped whole.  Whitening, as copy detection does it: Pizzi et al.
(arXiv 2202.10261), section 4.
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

# Cosines above which pictures are copies: whitened, and as they are (tests/benchmarks/records/curation.json).
THRESHOLDS = {True: 0.75, False: 0.98}
TILE = 4096  # rows that are compared with a block at a time


def search(
    store: Store,
    queries: Array,  # [Q, C]
    k: int,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """The `k` pictures that are most like each query: cosines [Q, k], falling, and numbers [Q, k].

    Raises: InputError for vectors of another width.
    """
    if queries.shape[1] != store.width:
        raise InputError(
            f"queries have {queries.shape[1]} numbers and '{store.path}' has {store.width}; use one model and pooling"
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
    """What `duplicates` found."""

    group: Array  # [N] int64: the first picture of the group that each belongs to
    foreign: Array  # [N] bool: pictures of a group that touches the other set

    def kept(self, store: Store) -> Array:
        """Numbers of the pictures that stay: the first of each group that is not foreign, of those that were read."""
        return np.flatnonzero(store.good & (self.group == np.arange(len(self.group))) & ~self.foreign)


def duplicates(
    store: Store,
    threshold: float | None = None,  # cosine; None for what suits whitened vectors, or those that are not
    against: Store | None = None,
    against_threshold: float | None = None,  # None: the same
    whiten: bool = True,
    device: torch.device | str = "cpu",
) -> Duplicates:
    """Groups of pictures that are connected by cosines above `threshold`, and those that touch the set `against`.
    Equal vectors are connected whatever the threshold and the whitening.

    `whiten`: by the mean and covariance of the store.  Vectors of a model share most of their direction, and what
    tells one picture from another of its kind is a small part of them, which this makes as large as the rest.

    Every pair is compared, in tiles: the time grows with the square of their number, the memory does not.

    Raises: InputError for vectors that were made in different ways, and for a threshold that is no cosine.
    """
    threshold = THRESHOLDS[whiten] if threshold is None else threshold
    limit = threshold if against_threshold is None else against_threshold
    for cosine in (threshold, limit):
        if not -1 <= cosine <= 1:
            raise InputError(f"a threshold is a cosine, from -1 to 1; got {cosine:g}")
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
    """[N] uint64, the same for equal vectors, and for others but once in 2^63 pairs."""
    keys = np.random.default_rng(0).integers(1, 2**63, store.width, np.uint64) * 2 + 1
    found = np.zeros(len(store), np.uint64)
    for first, rows in store.blocks():
        bits = (rows + 0.0).view(np.uint32)  # minus zero is zero
        found[first : first + len(rows)] = (bits * keys).sum(1, dtype=np.uint64)
    return found


def _whitening(store: Store, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Mean [C] and matrix [C, C] after which all directions vary alike, those that hardly vary excepted."""
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
    values += values.mean() * (0.1 + store.width / max(1, count)) + 1e-12  # few pictures tell little of directions
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
    """Rows of pairs; NaN is above nothing."""
    left, right = (one @ other.T > threshold).nonzero(as_tuple=True)
    return left.cpu().numpy(), right.cpu().numpy()


def _roots(parent: Array, rows: Array) -> Array:
    """The lowest number of the group of each."""
    while True:
        above = parent[rows]
        if np.array_equal(above, rows):
            return above
        rows = above


def _join(parent: Array, left: Array, right: Array) -> None:
    """Union by the lowest number, all pairs at a time: each round hangs a root under a lower one."""
    while len(left):
        left, right = _roots(parent, left), _roots(parent, right)
        apart = left != right
        left, right = left[apart], right[apart]
        np.minimum.at(parent, np.maximum(left, right), np.minimum(left, right))
