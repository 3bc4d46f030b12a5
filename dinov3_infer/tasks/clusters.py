"""Hierarchical k-means and samples that are balanced over it; retrieval around seed pictures.

Source: Vo et al. (arXiv 2405.15613), algorithm 1 and section 3; DINOv2 paper (arXiv 2304.07193), appendix A.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..features.disk.store import BLOCK, Store
from ..features.vectors import Array
from .neighbours import search

__all__ = ["Hierarchy", "allocate", "default_clusters", "hierarchy", "kmeans", "retrieve"]

Points: TypeAlias = Callable[[], Iterator[Tensor]]  # blocks [n, C], the same at every call

SAMPLE = 1 << 16  # rows among which the first centres are drawn
ROUNDS = 10  # of resampling, on all levels but the first
STEPS = 64  # in which the first centres are drawn
SEEDS = 3  # more than so many seed pictures make a cluster count


@dataclass(frozen=True)
class Hierarchy:
    """Clusters of clusters, the finest first."""

    parents: tuple[Array, ...]  # int64: the cluster of each point, the cluster above each cluster, ...
    points: Array  # [n] int64: the numbers of the pictures that are clustered

    def sample(self, count: int, seed: int = 0) -> Array:
        """Numbers of `count` pictures, sorted: each cluster gives as many as the others as far as it has them, from the
        top down, and in the finest ones they are drawn.
        """
        rng = np.random.default_rng(seed)
        sizes = [np.ones(len(self.points), np.int64)]
        for above in self.parents:
            sizes.append(np.bincount(above, sizes[-1], int(above.max()) + 1).astype(np.int64))
        wanted = allocate(sizes[-1], count, rng)
        for above, below in zip(reversed(self.parents), reversed(sizes[:-1]), strict=True):
            order = np.argsort(above, kind="stable")
            ends = np.cumsum(np.bincount(above, minlength=len(wanted)))
            given = np.zeros(len(above), np.int64)
            for cluster, members in enumerate(np.split(order, ends[:-1])):
                if wanted[cluster]:
                    given[members] = allocate(below[members], int(wanted[cluster]), rng)
            wanted = given
        return self.points[np.flatnonzero(wanted)]


def allocate(sizes: Array, count: int, rng: np.random.Generator) -> Array:
    """How many of `count` to take from sets of these sizes: min(size, c) with the largest c that does, and what is left
    one by one from sets drawn among the larger ones.
    """
    if count >= sizes.sum():
        return sizes.copy()
    low, high = 0, int(sizes.max())
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(sizes, middle).sum() <= count else (low, middle - 1)
    taken = np.minimum(sizes, low)
    larger = np.flatnonzero(sizes > low)
    taken[rng.choice(larger, count - int(taken.sum()), replace=False)] += 1
    return taken


def default_clusters(count: int) -> list[int]:
    """A twentieth of the pictures, a twentieth of that, and so on, to ten at least."""
    found = [max(1, count // 20)]
    while found[-1] // 20 >= 10:
        found.append(found[-1] // 20)
    return found


def hierarchy(
    store: Store,
    clusters: Sequence[int] | None = None,  # of each level, the finest first; None: see `default_clusters`
    within: Array | None = None,  # [N] bool: pictures that take part, such as those that are no duplicates
    seed: int = 0,
    iterations: int = 25,
    device: torch.device | str = "cpu",
) -> Hierarchy:
    """Level by level k-means on the centres of the level below.

    Above the first level the points nearest to each centre are clustered anew, several times, and all assigned again:
    so the centres spread evenly over where there is anything at all, and not by how much there is.

    Raises: InputError for numbers of clusters that do not fall, or are more than there are pictures.
    """
    taking_part = store.good & (True if within is None else within)
    count = int(taking_part.sum())
    wanted = list(clusters or default_clusters(count))
    if not wanted or any(a <= b for a, b in zip([count + 1, *wanted], wanted, strict=False)) or wanted[-1] < 1:
        raise InputError(f"clusters are fewer on each level, from {count} pictures on; got {wanted}")

    def points() -> Iterator[Tensor]:
        for first, block in store.blocks():
            rows = block[taking_part[first : first + len(block)]]
            if len(rows):
                yield torch.from_numpy(rows).to(device)

    generator = torch.Generator().manual_seed(seed)
    centres, above = kmeans(points, wanted[0], generator, iterations)
    parents = [above]
    for k in wanted[1:]:
        below = centres

        def all_below(rows: Tensor = below) -> Iterator[Tensor]:
            return iter(rows.split(BLOCK))

        centres, above = kmeans(all_below, k, generator, iterations)
        for _ in range(ROUNDS):
            chosen = below[_closest(below, centres, above, max(1, len(below) // (2 * k)))]
            centres, _ = kmeans(lambda rows=chosen: iter(rows.split(BLOCK)), k, generator, iterations)  # type: ignore[misc]
            above = _assigned(all_below, centres)[0]
        parents.append(above)
    return Hierarchy(tuple(parents), np.flatnonzero(taking_part))


def kmeans(points: Points, k: int, generator: torch.Generator, iterations: int = 25) -> tuple[Tensor, Array]:
    """Centres [k, C] and the cluster of each point, by Lloyd's steps from k-means++, a block in memory at a time."""
    centres = _first_centres(points, k, generator)
    before = float("inf")
    for _ in range(iterations):
        sums = torch.zeros_like(centres, dtype=torch.float64)
        counts = torch.zeros(k, dtype=torch.float64, device=centres.device)
        total = 0.0
        for block in points():
            found, distance = _nearest_centres(block, centres)
            sums.index_add_(0, found, block.double())
            counts.index_add_(0, found, torch.ones_like(found, dtype=torch.float64))
            total += float(distance.sum())
        filled = counts > 0  # an empty one stays where it is
        centres[filled] = (sums[filled] / counts[filled, None]).to(centres.dtype)
        if before - total <= 1e-4 * total:
            break
        before = total
    return centres, _assigned(points, centres)[0]


def _nearest_centres(block: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Which centre is nearest to each row, and the square of its distance."""
    found, distances = [], []
    for rows in block.split(max(1, (1 << 25) // len(centres))):
        squares = rows.square().sum(1, keepdim=True) - 2 * rows @ centres.T + centres.square().sum(1)
        least = squares.min(dim=1)
        found.append(least.indices)
        distances.append(least.values.clamp(min=0))
    return torch.cat(found), torch.cat(distances)


def _assigned(points: Points, centres: Tensor) -> tuple[Array, Array]:
    pairs = [_nearest_centres(block, centres) for block in points()]
    return tuple(torch.cat(part).cpu().numpy() for part in zip(*pairs, strict=True))  # type: ignore[return-value]


def _first_centres(points: Points, k: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007) among a sample: points are drawn by how far they are from those before.

    For a large k many at a time, as in k-means|| (Bahmani et al., arXiv 1203.6402): one by one takes hours.
    """
    rows = torch.cat(list(_sampled(points, generator, max(SAMPLE, 4 * k))))
    chosen = torch.randint(len(rows), (1,), generator=generator, device="cpu")
    new, step = chosen, -(-k // STEPS)
    distance = torch.full((len(rows),), torch.inf, dtype=rows.dtype, device=rows.device)
    same = 1e-6 * rows.square().sum(1).mean()  # to rounding
    while len(chosen) < k:
        distance = torch.minimum(distance, _nearest_centres(rows, rows[new])[1])
        weights = torch.where(distance > same, distance, 0).cpu()
        wanted = min(step, k - len(chosen))
        if int(weights.count_nonzero()) < wanted:  # all the rest are copies
            weights = torch.ones_like(weights)
        new = torch.multinomial(weights, wanted, replacement=len(weights) < wanted, generator=generator)
        chosen = torch.cat((chosen, new))
    return rows[chosen].clone()


def _sampled(points: Points, generator: torch.Generator, most: int) -> Iterator[Tensor]:
    """About `most` rows, an equal share of every block."""
    total = sum(len(block) for block in points())
    for block in points():
        share = -(-len(block) * most // total)
        yield (
            block
            if share >= len(block)
            else block[torch.randperm(len(block), generator=generator, device="cpu")[:share]]
        )


def _closest(rows: Tensor, centres: Tensor, above: Array, most: int) -> Tensor:
    """Rows of the `most` points of each cluster that are nearest to its centre."""
    cluster = torch.from_numpy(above).to(rows.device)
    order = ((rows - centres[cluster]).square().sum(1)).argsort()
    order = order[cluster[order].argsort(stable=True)]  # by cluster, the nearest first
    sizes = torch.bincount(cluster, minlength=len(centres))
    place = torch.arange(len(rows), device=rows.device) - (sizes.cumsum(0) - sizes)[cluster[order]]
    return order[place < most]


def retrieve(
    store: Store,
    seeds: Store,
    k: int = 4,
    by_cluster: bool | None = None,  # None: for fewer than 10,000 seeds
    clusters: int | None = None,  # None: one for 1,000 pictures, ten at least
    per_cluster: int = 10_000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Array:
    """Numbers of the pictures that are like those of a set of seeds, sorted.

    For many seeds the `k` nearest of each; few seeds would give few pictures, so for them the pictures are clustered,
    and a cluster that more than three seeds fall into gives `per_cluster` at most.

    Raises: InputError for seeds that were made in another way, or that no cluster holds enough of.
    """
    store.check_comparable(seeds)
    asked = np.concatenate([block for _, block in seeds.blocks()])[seeds.good]
    if by_cluster is None:
        by_cluster = len(asked) < 10_000
    if not by_cluster:
        numbers = [search(store, part, k, device)[1] for part in np.array_split(asked, -(-len(asked) // BLOCK))]
        return np.unique(torch.cat(numbers).numpy())
    rng = np.random.default_rng(seed)
    count = min(int(store.good.sum()), clusters or max(10, len(store) // 1000))
    good = np.flatnonzero(store.good)

    def points() -> Iterator[Tensor]:
        for first, block in store.blocks():
            yield torch.from_numpy(block[store.good[first : first + len(block)]]).to(device)

    centres, cluster = kmeans(points, count, torch.Generator().manual_seed(seed))
    hits = np.bincount(_nearest_centres(torch.from_numpy(asked).to(device), centres)[0].cpu().numpy(), minlength=count)
    found = [good[cluster == c] for c in np.flatnonzero(hits > SEEDS)]
    if not found:
        raise InputError(
            f"no cluster of '{store.path}' holds more than {SEEDS} of the {len(asked)} seeds; give fewer clusters, "
            "more seeds, or take the nearest"
        )
    drawn = [rng.permutation(numbers)[:per_cluster] for numbers in found]
    return np.sort(np.concatenate(drawn))
