"""Numbered images in archives, tables and Datasets, for embed and the trainer alike."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from archives import CONTENT, same, write_table, write_tar
from oracles import SMALL, randomise
from pictures import complaint

from dinov3_infer import Backbone, ImageError, InputError, MissingFileError, load_image
from dinov3_infer.images.opening import as_source, open_images
from dinov3_infer.images.sources import Source
from dinov3_infer.train import open_data


@pytest.mark.parametrize(
    "make",
    [
        lambda p: write_tar(p / "a.tar"),
        lambda p: write_table(p / "a.parquet"),
        lambda p: write_table(p / "a.parquet", "picture", bare=True),
    ],
    ids=["tar", "table", "table of bytes"],
)
def test_containers(make: Any, tmp_path: Path) -> None:
    """Any picture by its number and in any order; sent to another process; taken by embed and by the trainer."""
    path = make(tmp_path)
    source = as_source(path)
    assert same(source, CONTENT) and torch.equal(source.load(6).image, load_image(CONTENT[6]))
    assert torch.equal(source.load(0).image, load_image(CONTENT[0]))
    assert same(pickle.loads(pickle.dumps(source)), CONTENT)
    assert source.key(2) == f"{path}#{'in/2.png' if path.suffix == '.tar' else 2}"
    assert torch.equal(open_data(path)[5], load_image(CONTENT[5]))
    bb = randomise(Backbone.from_config(SMALL["dinov3"]))
    assert np.array_equal(bb.embed(path, size=32), bb.embed(CONTENT, size=32))  # type: ignore[operator]
    listed = tmp_path / "l.txt"
    listed.write_text(f"{source.key(4)}\n{source.key(1)}\n")
    assert same(as_source(listed), [CONTENT[4], CONTENT[1]])
    listed.write_text(f"{path}#99\n")
    assert "no picture '99'" in complaint(MissingFileError, lambda: as_source(listed))


def test_hugging_face_datasets(tmp_path: Path) -> None:
    """In memory and saved to a folder; a bad picture is an error of its own."""
    datasets = pytest.importorskip("datasets")
    contents = [*CONTENT[:3], b"no picture"]
    rows = {"label": [0] * 4, "photo": [{"bytes": content, "path": None} for content in contents]}
    features = datasets.Features({"label": datasets.Value("int64"), "photo": datasets.Image()})
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(tmp_path / "saved")
    for source in (open_images(dataset), as_source(tmp_path / "saved")):
        assert isinstance(source, Source) and len(source) == 4
        assert torch.equal(source.load(1).image, load_image(CONTENT[1]))
        assert "item 3 of Dataset" in complaint(ImageError, lambda source=source: source.load(3))
    bb = randomise(Backbone.from_config(SMALL["dinov3"]))
    for given in (dataset, dataset.to_iterable_dataset()):
        rows = bb.embed(given, size=32, on_error="skip")  # type: ignore[operator]
        assert np.isnan(rows).all(axis=1).tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda p: p.write_bytes(b"PAR1" * 9), "is no whole Parquet file"),
        (lambda p: write_table(p, contents=["a", "b"], bare=True), "no pictures in"),
        (lambda p: write_table(p, contents=[]), "no pictures in"),
    ],
    ids=["damaged", "words", "empty"],
)
def test_tables_that_are_none(make: Any, said: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    make(tmp_path / "a.parquet")
    assert said in complaint(InputError, lambda: as_source(tmp_path / "a.parquet"))


def test_a_table_names_no_files(tmp_path: Path) -> None:
    """A row without bytes is not looked for on this machine."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    (tmp_path / "secret.png").write_bytes(CONTENT[0])
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": None, "path": str(tmp_path / "secret.png")}], kind)
    pyarrow.parquet.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
    source = as_source(tmp_path / "a.parquet")
    assert "holds no bytes" in complaint(ImageError, lambda: source.load(0))
