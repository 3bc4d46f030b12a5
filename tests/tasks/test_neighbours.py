"""Search and near-duplicates over vectors on disk, compared with plain definitions."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import complaint
from stores import directions, made

from dinov3_infer import InputError
from dinov3_infer.features.disk import store as store_module
from dinov3_infer.features.disk.store import Store
from dinov3_infer.tasks.clusters import retrieve
from dinov3_infer.tasks.neighbours import duplicates, search


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes blocks and tiles small, so that a few rows fill several of them."""
    monkeypatch.setattr(store_module.Store.blocks, "__defaults__", (7,))
    monkeypatch.setattr("dinov3_infer.tasks.neighbours.TILE", 3)


def test_nearest_are_those_of_a_full_sort(tmp_path: Path) -> None:
    """The search covers all blocks and leaves out images that failed."""
    vectors, queries = directions(40), 2 * directions(3, seed=1)
    store = made(tmp_path / "a", vectors, broken=(3, 17))
    scores, numbers = search(store, queries.astype(np.float32), 6)
    cosines = queries / 2 @ vectors.T
    cosines[:, [3, 17]] = -2
    expected = np.argsort(-cosines, axis=1)[:, :6]
    np.testing.assert_array_equal(numbers.numpy(), expected)
    np.testing.assert_allclose(scores.numpy(), np.take_along_axis(cosines, expected, 1), atol=1e-6)
    assert "have width 3" in complaint(InputError, lambda: search(store, np.zeros((1, 3), np.float32), 2))


def test_duplicates_are_connected_components(tmp_path: Path) -> None:
    """Chains count too, in any order; the first image of a group is kept."""
    vectors = directions(60)
    for chain in ((40, 7, 22, 58), (3, 4), (50, 1, 30)):
        for a, b in zip(chain, chain[1:], strict=False):  # each a small step from the one before
            vectors[b] = vectors[a] + 0.3 * directions(1, seed=b)[0]
            vectors[b] /= np.linalg.norm(vectors[b])
    store = made(tmp_path / "a", vectors, broken=(9,))
    found = duplicates(store, 0.9, whiten=False)
    groups = {tuple(np.flatnonzero(found.group == g)) for g in set(found.group)}
    assert {group for group in groups if len(group) > 1} == {(7, 22, 40, 58), (3, 4), (1, 30, 50)}
    expected = sorted(set(range(60)) - {22, 40, 58, 4, 30, 50, 9})
    assert found.kept(store).tolist() == expected
    assert vectors[40] @ vectors[58] < 0.9, "connected by what lies between alone"


def test_whitening_tells_duplicates_from_kin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vectors share most of their direction; whitening separates copies from similar images."""
    monkeypatch.setattr("dinov3_infer.tasks.neighbours.BLOCK", 50)
    vectors = directions(1, 64, 5) + 0.2 * directions(300, 64)
    copies = vectors[:20] + 0.04 * directions(20, 64, 8)
    store = made(tmp_path / "a", np.concatenate((vectors, copies)), broken=(100,))
    expected = {(i, 300 + i) for i in range(20)}

    def pairs(**options: Any) -> set[tuple[int, ...]]:
        group = duplicates(store, 0.85, **options).group
        return {tuple(np.flatnonzero(group == g)) for g in set(group) if (group == g).sum() > 1}

    assert pairs() == expected and len(max(pairs(whiten=False), key=len)) > 300
    against = made(tmp_path / "b", vectors[[3, 40]])
    foreign = duplicates(store, 0.85, against).foreign
    assert np.flatnonzero(foreign).tolist() == [3, 40, 303]


def test_duplicates_of_a_test_set_go_with_their_group(tmp_path: Path) -> None:
    vectors = directions(30)
    vectors[20] = vectors[5] + 0.05 * directions(1, seed=3)[0]
    test = directions(4, seed=9)
    test[2] = vectors[20]
    store, against = made(tmp_path / "a", vectors), made(tmp_path / "b", test)
    found = duplicates(store, 0.9, against, whiten=False)
    assert np.flatnonzero(found.foreign).tolist() == [5, 20]
    assert found.kept(store).tolist() == sorted(set(range(30)) - {5, 20})
    other = replace(against.recipe, fingerprint="0" * 64)
    (tmp_path / "b.npy" / "dinov3_infer.json").write_text(other.to_json())
    text = complaint(InputError, lambda: duplicates(store, 0.9, Store(tmp_path / "b.npy")))
    assert "come from different models" in text


@pytest.mark.parametrize("changed", [dict(pooling="mean"), dict(preprocess=dict(size=64))], ids=["pooling", "size"])
def test_vectors_that_were_made_in_another_way(changed: dict[str, Any], tmp_path: Path) -> None:
    """Their cosines would be meaningless, and nothing would show it."""
    store, other = made(tmp_path / "a", directions(8)), made(tmp_path / "b", directions(8))
    (tmp_path / "b.npy" / "dinov3_infer.json").write_text(replace(other.recipe, **changed).to_json())
    other = Store(tmp_path / "b.npy")
    for call in (lambda: duplicates(store, 0.9, other), lambda: retrieve(store, other, by_cluster=False)):
        text = complaint(InputError, call)
        assert "cannot be compared" in text and f"with {next(iter(changed))}" in text


@pytest.mark.parametrize("thresholds", [(75, None), (0.9, -2), (float("nan"), None)], ids=str)
def test_a_threshold_is_a_cosine(thresholds: tuple[float, float | None], tmp_path: Path) -> None:
    store = made(tmp_path / "a", directions(8))
    assert "from -1 to 1" in complaint(InputError, lambda: duplicates(store, thresholds[0], None, thresholds[1]))
