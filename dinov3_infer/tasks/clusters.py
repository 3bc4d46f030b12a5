"""Hierarchical k-means and samples that are balanced over its clusters; retrieval around seed images.

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

SAMPLE = 1 << 16  # rows from which the first centres are drawn
ROUNDS = 10  # of resampling, on each level above the first
STEPS = 64  # number of draws for the first centres
SEEDS = 3  # a cluster counts if it holds more seed images than this


@dataclass(frozen=True)
class Hierarchy:
    """Clusters of clusters, the finest level first."""

    parents: tuple[Array, ...]  # int64: the cluster of each point, then the parent of each cluster, ...
    points: Array  # [n] int64: numbers of the clustered images

    def sample(self, count: int, seed: int = 0) -> Array:
        """Draws `count` images and returns their numbers, sorted, [count] int64.

        From the top level down, each cluster gives the same number of images, or all of its images if it has fewer;
        inside the finest clusters the images are drawn at random.
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
    """Splits `count` over sets of sizes [n] as evenly as the sizes allow, [n].

    Each set gives min(size, c) with the largest possible c; random larger sets give one more each, up to `count`.
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
    """A twentieth of `count`, a twentieth of that, and so on, down to at least 10."""
    found = [max(1, count // 20)]
    while found[-1] // 20 >= 10:
        found.append(found[-1] // 20)
    return found


def hierarchy(
    store: Store,
    clusters: Sequence[int] | None = None,  # per level, the finest first; None: see `default_clusters`
    within: Array | None = None,  # [N] bool: images to cluster, for example without duplicates
    seed: int = 0,
    iterations: int = 25,
    device: torch.device | str = "cpu",
) -> Hierarchy:
    """Clusters the vectors by k-means, then the centres of each level by k-means for the next level.

    Above the first level, the points nearest to each centre are clustered again, several times, and all points are
    reassigned.  This spreads the centres evenly over the occupied space, independent of the density.

    Raises: InputError if the numbers of clusters do not decrease from level to level, or exceed the number of images.
    """
    taking_part = store.good & (True if within is None else within)
    count = int(taking_part.sum())
    wanted = list(clusters or default_clusters(count))
    if not wanted or any(a <= b for a, b in zip([count + 1, *wanted], wanted, strict=False)) or wanted[-1] < 1:
        raise InputError(f"clusters must decrease from level to level and stay below the {count} images; got {wanted}")

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
    """Centres [k, C] and the cluster of each point [n], by k-means++ and Lloyd's iterations over blocks."""
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
        filled = counts > 0  # the centre of an empty cluster stays
        centres[filled] = (sums[filled] / counts[filled, None]).to(centres.dtype)
        if before - total <= 1e-4 * total:
            break
        before = total
    return centres, _assigned(points, centres)[0]


def _nearest_centres(block: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each row, and its squared distance."""
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
    """k-means++ (Arthur and Vassilvitskii 2007) on a sample of the points.

    For a large k many centres are drawn at a time, as in k-means|| (Bahmani et al., arXiv 1203.6402); one by one takes
    hours.
    """
    rows = torch.cat(list(_sampled(points, generator, max(SAMPLE, 4 * k))))
    chosen = torch.randint(len(rows), (1,), generator=generator, device="cpu")
    new, step = chosen, -(-k // STEPS)
    distance = torch.full((len(rows),), torch.inf, dtype=rows.dtype, device=rows.device)
    same = 1e-6 * rows.square().sum(1).mean()  # equal up to rounding
    while len(chosen) < k:
        distance = torch.minimum(distance, _nearest_centres(rows, rows[new])[1])
        weights = torch.where(distance > same, distance, 0).cpu()
        wanted = min(step, k - len(chosen))
        if int(weights.count_nonzero()) < wanted:  # the other rows are copies of the centres
            weights = torch.ones_like(weights)
        new = torch.multinomial(weights, wanted, replacement=len(weights) < wanted, generator=generator)
        chosen = torch.cat((chosen, new))
    return rows[chosen].clone()


def _sampled(points: Points, generator: torch.Generator, most: int) -> Iterator[Tensor]:
    """About `most` rows, the same share of every block."""
    total = sum(len(block) for block in points())
    for block in points():
        share = -(-len(block) * most // total)
        yield (
            block
            if share >= len(block)
            else block[torch.randperm(len(block), generator=generator, device="cpu")[:share]]
        )


def _closest(rows: Tensor, centres: Tensor, above: Array, most: int) -> Tensor:
    """For each cluster, the rows of the `most` points that are nearest to its centre."""
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
    by_cluster: bool | None = None,  # None: if there are fewer than 10,000 seeds
    clusters: int | None = None,  # None: one per 1,000 images, at least 10
    per_cluster: int = 10_000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Array:
    """Finds images that are similar to seed images; returns their numbers, sorted, [n] int64.

    For many seeds, these are the `k` nearest images of each seed.  Few seeds would give few images, so for them the
    images are clustered, and each cluster with more than three seeds gives up to `per_cluster` images.

    Raises: InputError if the seeds were made with other settings, or no cluster holds enough seeds.
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
            "more seeds, or take the nearest images of each seed"
        )
    drawn = [rng.permutation(numbers)[:per_cluster] for numbers in found]
    return np.sort(np.concatenate(drawn))
