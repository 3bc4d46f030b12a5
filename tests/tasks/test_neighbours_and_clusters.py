"""Search, near-duplicates, balanced samples and retrieval over vectors on disk, against plain definitions."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import refused, run, small_model, write_pictures
from pictures import complaint, photo
from PIL import Image

from dinov3_infer import InputError, MissingFileError
from dinov3_infer.features.disk import store as store_module
from dinov3_infer.features.disk.formats import FORMATS, Rows
from dinov3_infer.features.disk.lists import listed_in, write_list
from dinov3_infer.features.disk.recipe import BatchPlan, Recipe
from dinov3_infer.features.disk.store import Store
from dinov3_infer.tasks.clusters import allocate, hierarchy, kmeans, retrieve
from dinov3_infer.tasks.neighbours import duplicates, nearest
from dinov3_infer.train import open_data

RECIPE = Recipe(
    "0",
    None,
    "f" * 64,
    {},
    {},
    "exact",
    "float32",
    "embedding",
    "cls",
    False,
    "float32",
    (4,),
    0,
    None,
    BatchPlan(5, 1, 1),
)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and tiles for a handful of rows."""
    monkeypatch.setattr(store_module.Store.blocks, "__defaults__", (7,))
    monkeypatch.setattr("dinov3_infer.tasks.neighbours.TILE", 3)


def made(path: Path, vectors: np.ndarray, broken: tuple[int, ...] = (), suffix: str = ".npy") -> Store:
    """A folder of shards of five."""
    vectors = vectors.astype(np.float32)
    vectors[list(broken)] = np.nan
    path = path.with_suffix(suffix)
    path.mkdir()
    form = FORMATS[suffix]()
    for first in range(0, len(vectors), 5):
        rows = Rows(first, vectors[first : first + 5], "float32")
        for i in range(first, first + len(rows.vectors)):
            rows.paths.append(f"{path.name}/{i}.png")
            rows.grids.append(None)
            rows.errors.append("cannot read" if i in broken else "")
        form.write(path / f"{first // 5:06d}{suffix}", rows, "")
    recipe = replace(RECIPE, count=len(vectors), shape=vectors.shape[1:])
    (path / "dinov3_infer.json").write_text(recipe.to_json())
    return Store(path)


def directions(count: int, width: int = 16, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(count, width))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


# --- the store ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_store_is_read_in_blocks(suffix: str, tmp_path: Path) -> None:
    """Rows of length 1 with the number of the first, over all shards; names and failures of each."""
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    vectors = 3 * directions(23)
    store = made(tmp_path / "a", vectors, broken=(4, 11), suffix=suffix)
    blocks = list(store.blocks())
    assert [first for first, _ in blocks] == [0, 5, 10, 15, 20] and len(store) == 23 and store.width == 16
    found = np.concatenate([block for _, block in blocks])
    good = np.delete(np.arange(23), [4, 11])
    np.testing.assert_allclose(found[good], vectors[good] / 3, rtol=1e-5)
    assert np.isnan(found[[4, 11]]).all() and np.flatnonzero(~store.good).tolist() == [4, 11]
    assert store.paths[11] == f"a{suffix}/11.png" and len(store.paths) == 23


def test_what_is_no_store_is_said(tmp_path: Path) -> None:
    made(tmp_path / "a", directions(12))
    assert "no vectors at" in complaint(MissingFileError, lambda: Store(tmp_path / "none.npy"))
    assert "is not one of embed" in complaint(InputError, lambda: Store(tmp_path))
    np.save(tmp_path / "plain.npy", np.zeros((3, 4)))
    assert "does not say how it was made" in complaint(InputError, lambda: Store(tmp_path / "plain.npy"))
    record = tmp_path / "a.npy" / "dinov3_infer.json"
    whole = record.read_text()
    record.write_text(json.dumps(json.loads(whole) | {"kind": "map"}))
    assert "holds map" in complaint(InputError, lambda: Store(tmp_path / "a.npy"))
    record.write_text(whole)
    (tmp_path / "a.npy" / "000001.npy").unlink()
    assert "holds 2 of 3 shards; run the same embed again" in complaint(InputError, lambda: Store(tmp_path / "a.npy"))
    record.write_text("{}")
    assert "is damaged" in complaint(InputError, lambda: Store(tmp_path / "a.npy"))


# --- neighbours -----------------------------------------------------------------------------------------------------


def test_nearest_are_those_of_a_full_sort(tmp_path: Path) -> None:
    """Across blocks, without pictures that failed."""
    vectors, queries = directions(40), 2 * directions(3, seed=1)
    store = made(tmp_path / "a", vectors, broken=(3, 17))
    scores, numbers = nearest(store, queries.astype(np.float32), 6)
    cosines = queries / 2 @ vectors.T
    cosines[:, [3, 17]] = -2
    expected = np.argsort(-cosines, axis=1)[:, :6]
    np.testing.assert_array_equal(numbers.numpy(), expected)
    np.testing.assert_allclose(scores.numpy(), np.take_along_axis(cosines, expected, 1), atol=1e-6)
    assert "have 3 numbers" in complaint(InputError, lambda: nearest(store, np.zeros((1, 3), np.float32), 2))


def test_duplicates_are_connected_components(tmp_path: Path) -> None:
    """Chains too, in any order; the first of a group stays."""
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
    """Vectors that share most of their direction: what is left tells pictures apart, and copies from their likes."""
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
    """Their cosines would mean nothing, and nobody would see it."""
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


# --- clusters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, count, least",
    [([5, 5, 5], 9, [3, 3, 3]), ([1, 2, 100], 30, [1, 2, 27]), ([4, 4], 100, [4, 4]), ([3, 3, 3], 5, [1, 1, 1]),
     ([7], 0, [0]), ([0, 9], 4, [0, 4])],
)  # fmt: skip
def test_shares_are_as_equal_as_sizes_allow(sizes: list[int], count: int, least: list[int]) -> None:
    """The sum is what was asked for, and nobody gets two more than another that has more to give."""
    taken = allocate(np.array(sizes), count, np.random.default_rng(0))
    assert taken.sum() == min(count, sum(sizes)) and (taken <= sizes).all()
    assert (taken >= least).all() and (taken - least <= 1).all()


def test_kmeans_finds_what_is_apart(tmp_path: Path) -> None:
    """Blobs far from each other, in blocks; the centres are their means."""
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
    """Where several are drawn at a time, most places still get one of their own; of copies alone there are enough."""
    rows = torch.from_numpy(np.repeat(directions(places, 64), copies, 0)).float()
    found, cluster = kmeans(lambda: iter(rows.split(50)), k, torch.Generator().manual_seed(0), 5)
    assert found.shape == (k, 64) and found.isfinite().all()
    assert len(set(cluster.tolist())) >= min(places, 0.8 * k)
    assert (rows - found[cluster]).square().sum(1).mean() < 0.25


def long_tailed(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ten classes of 400 down to 4 around directions of their own, shuffled."""
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
    """Nearly as many of each class as there are, where a random one repeats the tail."""
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
    """Many seeds give their nearest; few give the clusters that more than three of them fall into."""
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
    assert "fewer on each level" in complaint(InputError, lambda: hierarchy(store, clusters))


# --- lists ----------------------------------------------------------------------------------------------------------


def test_lists_lead_back_to_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute paths that the trainer takes, those with line breaks too."""
    monkeypatch.chdir(tmp_path)
    for names in (["a.png", "b c.png"], ["a.png", "two\nlines.png"], ["a.png", "a\ttab.png"]):
        for name in names:
            Image.fromarray(photo(8, 8)).save(tmp_path / name)
        assert write_list(tmp_path / "l.txt", names) == 2
        data = open_data(tmp_path / "l.txt")
        assert [data.sources[0].key(i) for i in range(len(data))] == [str(tmp_path / name) for name in names]
    store = made(tmp_path / "a", directions(6))
    write_list(tmp_path / "l.txt", [store.paths[2], store.paths[5]])
    assert np.flatnonzero(listed_in(store, tmp_path / "l.txt")).tolist() == [2, 5]
    write_list(tmp_path / "l.txt", ["elsewhere.png"])
    assert "names none of the 6 pictures" in complaint(InputError, lambda: listed_in(store, tmp_path / "l.txt"))
    assert "no names" in complaint(InputError, lambda: write_list(tmp_path / "l.txt", ["", ""]))


# --- the command line -----------------------------------------------------------------------------------------------


def test_commands(tmp_path: Path) -> None:
    """From pictures to a sheet of what is alike, and to lists; the query is embedded as the vectors were."""
    album = write_pictures(tmp_path / "in", *(f"{i}.png" for i in range(8)), "broken.png")
    Image.open(album / "3.png").save(album / "copy.png")
    vectors, model = tmp_path / "x.npy", ("-m", small_model(), "--device", "cpu")
    assert run("embed", album, "-o", vectors, *model, "--size", "32", "--pooling", "mean").status == 3
    ran = run("embed", "search", album / "3.png", vectors, "-k", "3", *model, "-o", tmp_path / "s.png", "-o",
              tmp_path / "s.txt")  # fmt: skip
    lines = [line.split("\t") for line in ran.out.splitlines()]
    assert ran.status == 0 and {Path(name).name for _, name in lines[:2]} == {"3.png", "copy.png"} and len(lines) == 3
    assert (
        lines[0][0] == "1.0000"
        and Image.open(tmp_path / "s.png").width > 600
        and len(open_data(tmp_path / "s.txt")) == 3
    )
    ran = run("embed", "dedup", vectors, "-o", tmp_path / "kept.txt", "--threshold", "0.9999", "--plain")
    assert ran.out == f"{album / 'copy.png'}\t{album / '3.png'}\n"
    assert "8 of 10 pictures; 1 are like others, 1 have no vector" in ran.err
    ran = run("embed", "curate", vectors, "-o", tmp_path / "c.txt", "-n", "4", "--clusters", "3", "--within",
              tmp_path / "kept.txt")  # fmt: skip
    assert ran.status == 0 and len(open_data(tmp_path / "c.txt")) == 4
    assert "copy.png" not in (tmp_path / "c.txt").read_text()
    refused(1, "-n for a balanced sample, or --seeds", "embed", "curate", vectors, "-o", tmp_path / "d.txt")
    for words, command, *options in (
        ("give --seeds too", "curate", "--nearest", "3", "-n", "2"),
        ("leave it out, or --seeds", "curate", "--seeds", vectors, "--clusters", "3"),
        ("give --against too", "dedup", "--against-threshold", "0.5"),
    ):
        refused(1, words, "embed", command, vectors, "-o", tmp_path / "d.txt", *options)
    other: Any = ("-m", tmp_path / "other", "--device", "cpu")
    from dinov3_infer import Backbone

    Backbone.from_config("nano", seed=1).save_pretrained(tmp_path / "other")
    refused(1, "was made with other weights than", "embed", "search", album / "3.png", vectors, *other)
