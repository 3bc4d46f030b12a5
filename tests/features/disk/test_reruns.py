"""Reruns: changed sources under old names, failed images, and outputs of a version without checksums."""

import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from outputs import COUNT, OPTIONS, OUTS, age, files, fill, plain, rows
from pictures import complaint, photo
from PIL import Image

from dinov3_infer import Backbone, InputError
from dinov3_infer.features.disk.store import Store

# --- sources --------------------------------------------------------------------------------------------------------


def replaced(folder: Path) -> tuple[Any, Any, set[int]]:
    before = [str(folder / f"{i}.png") for i in range(COUNT)]

    def again() -> Any:
        for i in (1, 8):
            Image.fromarray(photo(40, 30, seed=90 + i)).save(folder / f"{i}.png")
        return before

    return before, again, {1, 8}


def same_size_other_time(folder: Path) -> tuple[Any, Any, set[int]]:
    def again() -> Any:
        content = (folder / "2.png").read_bytes()
        time.sleep(0.02)
        (folder / "2.png").write_bytes(content)
        return folder

    return folder, again, {2}


def other_folder(folder: Path) -> tuple[Any, Any, set[int]]:
    """The same relative names in another folder."""
    for name in ("one", "two"):
        (folder.parent / name).mkdir()
    shutil.move(folder, folder.parent / "one" / "album")
    fill(folder.parent / "two" / "album", 50)
    os.chdir(folder.parent / "one")

    def again() -> Any:
        os.chdir(folder.parent / "two")
        return "album"

    return "album", again, set(range(COUNT))


def archive(folder: Path) -> tuple[Any, Any, set[int]]:
    def pack() -> Path:
        with tarfile.open(folder.parent / "a.tar", "w") as made:
            for i in range(COUNT):
                made.add(folder / f"{i}.png", f"{i}.png")
        return folder.parent / "a.tar"

    def again() -> Any:
        fill(folder, 60)
        return pack()

    return pack(), again, set(range(COUNT))


def table(folder: Path) -> tuple[Any, Any, set[int]]:
    arrow = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    def pack() -> Path:
        content = [(folder / f"{i}.png").read_bytes() for i in range(COUNT)]
        arrow.write_table(pyarrow.table({"image": content}), folder.parent / "images.parquet")
        return folder.parent / "images.parquet"

    def again() -> Any:
        fill(folder, 70)
        return pack()

    return pack(), again, set(range(COUNT))


def hugging_face(folder: Path) -> tuple[Any, Any, set[int]]:
    datasets = pytest.importorskip("datasets")

    def made() -> Any:
        content = [(folder / f"{i}.png").read_bytes() for i in range(COUNT)]
        features = datasets.Features({"image": datasets.Image()})
        return datasets.Dataset.from_dict({"image": [{"bytes": c, "path": None} for c in content]}, features=features)

    def again() -> Any:
        fill(folder, 80)
        return made()

    return made(), again, set(range(COUNT))


def hugging_face_of_files(folder: Path) -> tuple[Any, Any, set[int]]:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"image": [str(folder / f"{i}.png") for i in range(COUNT)]})
    made = made.cast_column("image", datasets.Image())

    def again() -> Any:
        Image.fromarray(photo(40, 30, seed=77)).save(folder / "5.png")
        return made

    return made, again, {5}


def addresses(folder: Path) -> tuple[Any, Any, set[int]]:
    """Data addresses, which contain their content; a list does not show it."""
    import base64

    def address(i: int, seed: int = 0) -> str:
        Image.fromarray(photo(20, 20, seed=seed + i)).save(folder / "d.png")
        return "data:image/png;base64," + base64.b64encode((folder / "d.png").read_bytes()).decode()

    first = [address(i) for i in range(COUNT)]
    return first, lambda: [*first[:3], address(3, 40), *first[4:]], {3}


KINDS = [
    replaced, same_size_other_time, other_folder, archive, table, hugging_face, hugging_face_of_files, addresses,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("out", ["x/", "x.npy", "x.parquet"])
def test_other_sources_under_old_names_are_computed(
    kind: Callable[[Path], tuple[Any, Any, set[int]]], out: str, bb: Backbone, album: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Only changed sources are computed and counted, once; trust_names skips the check."""
    monkeypatch.chdir(tmp_path)
    out = f"{tmp_path}/{out}"
    before, again, changed = kind(album)
    bb.embed(before, out, **OPTIONS)
    assert bb.embed(before, out, **OPTIONS).resumed == COUNT
    old, images = rows(out), again()
    assert bb.embed(images, out, trust_names=True, **OPTIONS).changed == 0
    assert np.array_equal(rows(out), old)
    report = bb.embed(images, out, **OPTIONS)
    assert (report.changed, report.resumed) == (len(changed), COUNT - len(changed))
    np.testing.assert_allclose(rows(out), plain(bb, images), atol=1e-6)
    assert bb.embed(images, out, **OPTIONS).resumed == COUNT and not Path(f"{out}.parts").exists()


class Pixels(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> np.ndarray:
        return photo(32, 32, seed=self.seed + index)


@pytest.mark.parametrize("out", ["x/", "x.npy"])
def test_a_dataset_without_names_is_refused(out: str, bb: Backbone, tmp_path: Path) -> None:
    out = f"{tmp_path}/{out}"
    bb.embed(Pixels(0), out, **OPTIONS)
    old = rows(out)
    text = complaint(InputError, lambda: bb.embed(Pixels(50), out, **OPTIONS))
    assert "a rerun cannot check" in text and "trust_names" in text
    assert bb.embed(Pixels(0), out, trust_names=True, **OPTIONS).resumed == 6
    assert np.array_equal(rows(out), old)


def test_signed_addresses_are_told_apart_and_not_stored(bb: Backbone, tmp_path: Path) -> None:
    """No address is reachable here; the record stores its name without the query, and a hash."""
    given = ["http://127.0.0.1:9/a.png?X-Signature=secret1", "http://user:secret2@127.0.0.1:9/b.png"]
    bb.embed(given, tmp_path / "x.npy", **OPTIONS)
    stored = "".join(path.read_text(errors="replace") for path in tmp_path.iterdir())
    assert "secret" not in stored
    sources = [json.loads(line)["source"] for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert len(set(sources)) == 2 and all(len(source) == 32 for source in sources)


def test_a_source_that_has_gone_keeps_its_vector(bb: Backbone, album: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [str(album / f"{i}.png") for i in range(COUNT)]
    bb.embed(names, f"{album.parent}/x/", **OPTIONS)
    old = rows(album.parent / "x")
    (album / "4.png").unlink()
    assert bb.embed(names, f"{album.parent}/x/", **OPTIONS).resumed == COUNT
    assert np.array_equal(rows(album.parent / "x"), old) and "the sources of 1 images" in caplog.text


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", OUTS)
def test_what_failed_is_tried_again(out: str, bb: Backbone, album: Path) -> None:
    """A repaired image gets its vector; an image that fails again keeps its row, and no file is written for it."""
    out, broken = f"{album.parent}/{out}", {i: (album / f"{i}.png").read_bytes() for i in (0, 3, 4)}
    for i, content in broken.items():
        (album / f"{i}.png").write_bytes(content[:60])
    assert len(bb.embed(album, out, **OPTIONS).failures) == 3
    before = {path: path.stat().st_mtime_ns for path in files(out)}
    again = bb.embed(album, out, **OPTIONS)
    assert (again.retried, again.resumed, len(again.failures)) == (3, COUNT - 3, 3)
    assert {path: path.stat().st_mtime_ns for path in files(out)} == before
    (album / "3.png").write_bytes(broken[3])
    (album / "4.png").write_bytes(broken[4])
    again = bb.embed(album, out, **OPTIONS)
    assert (again.retried, [f.row for f in again.failures]) == (3, [0])
    np.testing.assert_allclose(rows(out), plain(bb, album), atol=1e-6)
    assert not Path(f"{out}.parts").exists()


def test_maps_of_unequal_shape_are_patched(bb: Backbone, album: Path) -> None:
    arrow = pytest.importorskip("pyarrow.parquet")
    options: dict[str, Any] = dict(kind="map", fit="native", shard_size=4, on_error="skip")
    content = (album / "2.png").read_bytes()
    (album / "2.png").write_bytes(content[:50])
    bb.embed(album, album.parent / "x.parquet", **options)
    (album / "2.png").write_bytes(content)
    assert bb.embed(album, album.parent / "x.parquet", **options).retried == 1
    bb.embed(album, album.parent / "y.parquet", **options)
    mine, fresh = (arrow.read_table(album.parent / f"{name}.parquet").drop(["source"]) for name in "xy")
    assert mine.to_pylist() == fresh.to_pylist()


# --- old outputs ------------------------------------------------------------


@pytest.mark.parametrize("out", ["x/", "x.npy", "x.safetensors", "x.parquet/"])
def test_old_outputs_are_read_and_continued(
    out: str, bb: Backbone, album: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Outputs without checksums and sources are used, with one log line, and failed images are tried again."""
    out = f"{album.parent}/{out}"
    content = (album / "5.png").read_bytes()
    (album / "5.png").write_bytes(content[:50])
    bb.embed(album, out, **OPTIONS)
    age(out)
    old = Store(out)
    assert len(old) == COUNT and "have no checksums" in caplog.text
    caplog.clear()
    (album / "5.png").write_bytes(content)
    report = bb.embed(album, out, **OPTIONS)
    assert (report.retried, report.resumed, report.failures) == (1, COUNT - 1, ())
    said = [r.getMessage() for r in caplog.records if "not checked:" in r.getMessage()]
    assert len(said) == 1 and f"the sources of {COUNT - 1} images" in said[0] and "no checksums" in said[0]
    found = np.concatenate([block for _, block in Store(out).blocks()])
    np.testing.assert_allclose(found, plain(bb, album), atol=1e-6)
