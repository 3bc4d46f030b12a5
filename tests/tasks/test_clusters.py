"""Balanced samples and retrieval over vectors on disk, compared with plain definitions."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import complaint
from stores import directions, made

from dinov3_infer import InputError
from dinov3_infer.features.disk import store as store_module
from dinov3_infer.tasks.clusters import allocate, hierarchy, kmeans, retrieve


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes blocks small, so that a few rows fill several of them."""
    monkeypatch.setattr(store_module.Store.blocks, "__defaults__", (7,))


@pytest.mark.parametrize(
    "sizes, count, least",
    [([5, 5, 5], 9, [3, 3, 3]), ([1, 2, 100], 30, [1, 2, 27]), ([4, 4], 100, [4, 4]), ([3, 3, 3], 5, [1, 1, 1]),
     ([7], 0, [0]), ([0, 9], 4, [0, 4])],
)  # fmt: skip
def test_shares_are_as_equal_as_sizes_allow(sizes: list[int], count: int, least: list[int]) -> None:
    """The sum is `count`, and no set gives two more than another set that has more to give."""
    taken = allocate(np.array(sizes), count, np.random.default_rng(0))
    assert taken.sum() == min(count, sum(sizes)) and (taken <= sizes).all()
    assert (taken >= least).all() and (taken - least <= 1).all()


def test_kmeans_finds_what_is_apart(tmp_path: Path) -> None:
    """For well separated blobs, in blocks, the centres are the means of the blobs."""
    centres = 10 * directions(5)
    points = np.repeat(centres, 30, 0) + 0.1 * directions(150, seed=2)
    points = points[np.random.default_rng(0).permutation(150)].astype(np.float32)
    blocks = torch.from_numpy(points).split(40)
    found, cluster = kmeans(lambda: iter(blocks), 5, torch.Generator().manual_seed(0))
    assert sorted(Counter(cluster.tolist()).values()) == [30] * 5
    for c in range(5):
        np.testing.assert_allclose(found[c].numpy(), points[cluster == c].mean(0), atol=1e-4)
    again = kmeans(lambda: iter(blocks), 5, torch.Generator().manual_seed(0))
    assert torch.equal(found, again[0])


@pytest.mark.parametrize("places, copies, k", [(150, 4, 150), (3, 40, 100)], ids=["many", "copies"])
def test_kmeans_with_more_centres_than_steps(places: int, copies: int, k: int) -> None:
    """With several draws at a time most blobs still get a centre; copies of one point give enough centres too."""
    rows = torch.from_numpy(np.repeat(directions(places, 64), copies, 0)).float()
    found, cluster = kmeans(lambda: iter(rows.split(50)), k, torch.Generator().manual_seed(0), 5)
    assert found.shape == (k, 64) and found.isfinite().all()
    assert len(set(cluster.tolist())) >= min(places, 0.8 * k)
    assert (rows - found[cluster]).square().sum(1).mean() < 0.25


def long_tailed(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ten shuffled classes of 400 down to 4 vectors, each around its own direction."""
    sizes = np.geomspace(400, 4, 10).round().astype(int)
    labels = np.repeat(np.arange(10), sizes)
    points = np.concatenate([d + 0.35 * directions(n, 32, 5 + i) for i, (d, n) in
                             enumerate(zip(directions(10, 32, 77), sizes, strict=True))])  # fmt: skip
    order = np.random.default_rng(seed).permutation(len(labels))
    return points[order], labels[order]


def entropy(labels: np.ndarray) -> float:
    shares = np.bincount(labels, minlength=10) / len(labels)
    return float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())


def test_a_balanced_sample_of_a_long_tail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample has nearly equal classes, where a random sample repeats the long tail."""
    monkeypatch.setattr(store_module.Store.blocks, "__defaults__", (512,))
    points, labels = long_tailed()
    store = made(tmp_path / "a", points)
    levels = hierarchy(store, [60, 10], seed=0)
    chosen = levels.sample(100, seed=0)
    assert len(set(chosen.tolist())) == 100 and (np.diff(chosen) > 0).all()
    drawn = np.random.default_rng(0).permutation(labels)[:100]
    assert entropy(labels[chosen]) > 0.9 * np.log(10) > entropy(drawn) + 0.2
    assert np.array_equal(chosen, hierarchy(store, [60, 10], seed=0).sample(100, seed=0))
    within = labels > 4
    assert (labels[hierarchy(store, [20, 5], within).sample(40)] > 4).all()
    assert len(levels.sample(10**6)) == len(labels)


def test_what_is_like_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many seeds return their nearest images; few seeds return the clusters that hold more than three of them."""
    monkeypatch.setattr(store_module.Store.blocks, "__defaults__", (512,))
    points, labels = long_tailed()
    store = made(tmp_path / "a", points, broken=(0,))
    seeds = made(tmp_path / "b", points[labels == 2][:6] + 0.02 * directions(6, 32))
    numbers = retrieve(store, seeds, k=4, by_cluster=False)
    assert set(labels[numbers]) == {2} and 6 <= len(numbers) <= 24
    numbers = retrieve(store, seeds, clusters=12)
    assert set(labels[numbers]) == {2} and len(numbers) > 40
    assert len(retrieve(store, seeds, clusters=12, per_cluster=10)) <= 20
    far = made(tmp_path / "c", points[[np.flatnonzero(labels == c)[0] for c in range(4)]])
    assert "no cluster" in complaint(InputError, lambda: retrieve(store, far, clusters=40))


@pytest.mark.parametrize("clusters", [[10, 10], [5, 9], [10**4], [0]], ids=str)
def test_clusters_that_cannot_be(clusters: list[int], tmp_path: Path) -> None:
    store = made(tmp_path / "a", directions(30))
    assert "must decrease from level to level" in complaint(InputError, lambda: hierarchy(store, clusters))
