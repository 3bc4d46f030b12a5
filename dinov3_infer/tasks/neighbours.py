"""Exact cosine neighbours among vectors in memory and on disk, and groups of near-duplicates.

Source: DINOv2 paper (arXiv 2304.07193), section 3 and appendix A: pairs above a cosine, connected components, one of
each kept; components that touch an evaluation set dropped whole.  Whitening, as copy detection does it: Pizzi et al.
(arXiv 2202.10261), section 4.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..features.disk.formats import Array
from ..features.disk.store import BLOCK, Store
from .fitted import Vectors, as_features

__all__ = ["Duplicates", "duplicates", "nearest", "search"]

CELLS = 2**26  # numbers of one matrix of cosines
TILE = 4096  # rows that are compared with a block at a time


def nearest(queries: Vectors, bank: Vectors, k: int) -> tuple[Tensor, Tensor]:
    """The k vectors of a bank [N, C] that are most like each query [M, C]: cosines [M, k], best first, and their rows.

    Raises: InputError for widths that differ, values that are not finite, or a bank of fewer than k vectors.
    """
    asked, known = as_features(queries, "queries"), as_features(bank, "bank")
    if asked.shape[1] != known.shape[1]:
        raise InputError(
            f"the queries have {asked.shape[1]} numbers and the bank {known.shape[1]}; use one model and one pooling"
        )
    if not 1 <= k <= len(known):
        raise InputError(f"k is {k} and the bank holds {len(known)} vectors; give a k from 1 to {len(known)}")
    known = F.normalize(known, dim=-1)
    parts = F.normalize(asked.to(known.device), dim=-1).split(max(1, CELLS // len(known)))
    found = [_most_like(part, known, k) for part in parts]
    cosines, rows = zip(*found, strict=True)
    return torch.cat(cosines), torch.cat(rows)


def search(
    store: Store,
    queries: Array,  # [Q, C]
    k: int,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """The `k` images of a store that are most like each query: cosines [Q, k], falling, and numbers [Q, k].

    Raises: InputError for vectors of another width.
    """
    if queries.shape[1] != store.width:
        raise InputError(
            f"queries have {queries.shape[1]} numbers and '{store.path}' has {store.width}; use one model and pooling"
        )
    asked = F.normalize(torch.from_numpy(queries).float(), dim=1).to(device)
    cosines = torch.empty(len(asked), 0, device=device)
    numbers = torch.empty(len(asked), 0, dtype=torch.int64, device=device)
    for first, block in store.blocks():
        found, rows = _most_like(asked, torch.from_numpy(block).to(device), k)
        cosines, numbers = torch.cat((cosines, found), 1), torch.cat((numbers, rows + first), 1)
        cosines, best = cosines.topk(min(k, cosines.shape[1]), dim=1)
        numbers = numbers.gather(1, best)
    return cosines.cpu(), numbers.cpu()


def _most_like(asked: Tensor, known: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines [Q, k] of vectors [Q, C] and [N, C] of length 1, falling, and rows; NaN is like nothing."""
    found = (asked @ known.T).nan_to_num(nan=-torch.inf).topk(min(k, len(known)), dim=1)
    return found.values, found.indices


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
    threshold: float,  # cosine
    against: Store | None = None,
    against_threshold: float | None = None,  # None: the same
    whiten: bool = True,
    device: torch.device | str = "cpu",
) -> Duplicates:
    """Groups of pictures that are connected by cosines above `threshold`, and those that touch the set `against`.

    `whiten`: by the mean and covariance of the store.  Vectors of a model share most of their direction, and what
    tells one picture from another of its kind is a small part of them, which this makes as large as the rest.

    Every pair is compared, in tiles: the time grows with the square of their number, the memory does not.

    Raises: InputError for vectors that were made in different ways, and for a threshold that is no cosine.
    """
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
    group = _roots(parent, parent)
    foreign = np.zeros(len(store), bool)
    if against is not None:
        for _, block in _blocks(against, BLOCK, change, device):
            for first, others in _blocks(store, TILE, change, device):
                found, _ = _above(others, block, limit)
                foreign[group[found + first]] = True
        foreign = foreign[group]
    return Duplicates(group, foreign)


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
            found = F.normalize((found - change[0]) @ change[1], dim=1)
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
