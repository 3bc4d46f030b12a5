"""Batches of the trainer: their order, their parts, and the effect of broken images."""

import contextlib
import multiprocessing
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import complaint, photo
from shades import Shades, shades, write

from dinov3_infer.errors import ImageError, InputError
from dinov3_infer.train.batches import Data, batches, open_data
from dinov3_infer.train.views import Batch, ViewConfig

SMALL = ViewConfig(32, 16, num_local=1)


def shaded(count: int) -> Data:
    return open_data(Shades(count))


def same(a: Batch, b: Batch) -> bool:
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_cost_their_own_place(tmp_path: Path, workers: int) -> None:
    """A fixed image of the same source replaces a broken one; no other image changes; every broken one is named."""
    for i in range(8):
        write(tmp_path / f"{i}.png", 20 * i)
    whole = next(batches(open_data(tmp_path), SMALL, batch_size=8))
    (tmp_path / "3.png").write_bytes(b"")
    (tmp_path / "5.png").write_bytes(b"\x89PNG but no more")
    half = batches(open_data(tmp_path), SMALL, batch_size=8, workers=workers, stop=1)
    (found,) = half
    assert set(half.broken) == {3, 5}
    assert "3.png" in half.broken[3] and "is empty" in half.broken[3]
    kept = [i for i, index in enumerate(whole.indices.tolist()) if index not in (3, 5)]
    assert torch.equal(found.indices[kept], whole.indices[kept])
    assert torch.equal(
        found.global_crops.unflatten(0, (2, 8))[:, kept], whole.global_crops.unflatten(0, (2, 8))[:, kept]
    )
    assert not {3, 5} & set(found.indices.tolist())
    assert same(found, next(batches(open_data(tmp_path), SMALL, batch_size=8)))


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_broken_images(tmp_path: Path, workers: int) -> None:
    """The error is one sentence with the reason of one of them, also from a worker."""
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"")
    run = batches(open_data(tmp_path), SMALL, batch_size=2, workers=workers)
    assert "3 images in a row cannot be read" in complaint(ImageError, lambda: next(run))


@pytest.mark.parametrize("end", ["closed", "failed"])
def test_workers_end(tmp_path: Path, end: str) -> None:
    """Workers end at once, even if someone keeps the exception."""
    write(tmp_path / "a.png", 1)
    data = open_data(tmp_path)
    if end == "failed":
        (tmp_path / "a.png").write_bytes(b"")
    run = batches(data, SMALL, batch_size=2, workers=1)
    with contextlib.ExitStack() as kept:
        if end == "failed":
            kept.enter_context(pytest.raises(ImageError))
        next(run)
        assert multiprocessing.active_children()
        run.close()
    assert not multiprocessing.active_children()


def test_wrong_batches() -> None:
    """The error is one sentence."""
    assert "batch_size=7 does not divide among 2" in complaint(
        InputError, lambda: batches(shaded(4), SMALL, batch_size=7, world_size=2)
    )
    assert "probability above 0" in complaint(InputError, lambda: batches(shaded(4), [(0.0, SMALL)], batch_size=2))


# --- order ------------------------------------------------------------------------------------------------------------


def indices(data: Data, steps: int, batch_size: int, seed: int = 0) -> list[list[int]]:
    return [b.indices.tolist() for b in batches(data, SMALL, batch_size=batch_size, seed=seed, stop=steps)]


def test_every_image_once_before_any_comes_again() -> None:
    """This holds if batches do not divide the images; each epoch and each seed has another order."""
    flat = sum(indices(shaded(10), 5, 6), [])
    epochs = [flat[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert flat != sum(indices(shaded(10), 5, 6, seed=1), [])
    assert sorted(sum(indices(shaded(3), 1, 9), [])) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_pure_and_mixed_batches() -> None:
    """A tenth of the batches is from one source, in full; the others mix the remaining sources by size."""
    data = open_data([(Shades(12), 0.25), Shades(30), Shades(10)])
    found = indices(data, 200, 4)
    pure = [batch for batch in found if max(batch) < 12]
    assert 0.15 < len(pure) / 200 < 0.35
    mixed = [batch for batch in found if batch not in pure]
    assert all(min(batch) >= 12 for batch in mixed)
    for stream, numbers in ((pure, range(12)), (mixed, range(12, 52))):
        flat = sum(stream, [])
        for i in range(0, len(flat) - len(numbers) + 1, len(numbers)):
            assert sorted(flat[i : i + len(numbers)]) == list(numbers)
    resumed = [b.indices.tolist() for b in batches(data, SMALL, batch_size=4, start=150, stop=200)]
    assert resumed == found[150:]


def test_shares_of_paths(tmp_path: Path) -> None:
    """PATH:0.1:pure means the same as the pair (PATH, 0.1); other colons belong to the path."""
    write(tmp_path / "a/1.png", 1)
    write(tmp_path / "b:2/2.png", 2)
    data = open_data([f"{tmp_path}/a:0.1:pure", f"{tmp_path}/b:2"])
    assert data.pure == (0.1, 0.0) and shades(data) == [1, 2]
    assert open_data([(tmp_path / "a", 0.1), tmp_path / "b:2"]).pure == data.pure


@pytest.mark.parametrize("workers, world_size", [(0, 2), (2, 1), (1, 4)])
def test_one_run_however_it_is_cut(workers: int, world_size: int) -> None:
    """Runs with workers, with several processes or with a resume give the same bits as one process without them."""
    state = torch.get_rng_state()
    rows = [(0.5, SMALL), (0.5, ViewConfig(48, 16, num_local=2, gram_px=32))]
    data = open_data([(Shades(5), 0.3), Shades(20)])
    straight = list(batches(data, rows, batch_size=8, seed=3, stop=5))
    assert len({batch.global_crops.shape for batch in straight}) == 2
    parts = [
        list(batches(data, rows, batch_size=8, seed=3, start=2, stop=5, rank=r, world_size=world_size, workers=workers))
        for r in range(world_size)
    ]
    assert torch.equal(state, torch.get_rng_state())
    for step, whole in enumerate(straight[2:]):
        got = [part[step] for part in parts]
        together = [
            None
            if pieces[0] is None
            else torch.cat([p.unflatten(0, (-1, 8 // world_size)) for p in pieces], 1).flatten(0, 1)
            for pieces in zip(*got, strict=True)
        ]
        assert same(whole, Batch(*together))  # type: ignore[arg-type]


def test_every_place_has_views_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each position and step has different views of an image, which is read at the size that the views need."""
    asked: list[int] = []
    read = Data.read
    monkeypatch.setattr(Data, "read", lambda self, i, short_px=0: asked.append(short_px) or read(self, i, short_px))
    run = batches(open_data(photo(60, 60)[None]), SMALL, batch_size=6, stop=2)
    crops = torch.cat([batch.global_crops for batch in run])
    assert len({crop.sum().item() for crop in crops}) == 24
    assert asked == [SMALL.image_px] * 12


def test_threads_change_nothing() -> None:
    """Batches do not depend on the number of threads, and leave it unchanged."""
    data, before = open_data(np.stack([photo(200, 300, seed) for seed in range(4)])), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(next(batches(data, ViewConfig(), batch_size=4)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert same(*found)


def test_resolutions_are_drawn_as_told() -> None:
    """Each resolution is drawn with its probability, independently of the mixture."""
    rows = [(0.75, SMALL), (0.25, ViewConfig(48, 16, num_local=1))]
    data = open_data([(Shades(4), 0.5), (Shades(4), 0.5)])
    found = Counter((len(b.masks[0]), int(b.indices[0]) < 4) for b in batches(data, rows, batch_size=1, stop=300))
    for (patches, _), count in found.items():
        assert count / 300 == pytest.approx(0.375 if patches == 4 else 0.125, abs=0.07)


def test_masks_of_a_step_are_made_as_a_whole() -> None:
    """The masked counts cover all crops of a step over all processes, and no two masks are equal."""
    wanted = [0] * 16 + sorted(int(196 * (0.1 + 0.4 * (i + 1) / 16)) for i in range(16))
    for ratio in ((0.1, 0.5), (0.5, 0.5)):
        config, masks = ViewConfig(224, num_local=0, mask_ratio=ratio), []
        for rank in range(4):
            masks += next(batches(shaded(16), config, batch_size=16, rank=rank, world_size=4)).masks.tolist()
        assert sorted(map(sum, masks)) == (wanted if ratio[0] == 0.1 else [0] * 16 + [98] * 16)
        assert len({tuple(mask) for mask in masks if any(mask)}) == 16
