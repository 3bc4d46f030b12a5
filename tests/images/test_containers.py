"""Numbered images in archives, tables and Datasets, for embed and the trainer."""

import io
import pickle
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from archives import CONTENT, same, write_table, write_tar
from oracles import SMALL, randomise
from pictures import complaint, photo
from PIL import Image

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
    """Images can be read by number in any order, sent to another process, and used by embed and the trainer."""
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
    assert "no image '99'" in complaint(MissingFileError, lambda: as_source(listed))


def test_hugging_face_datasets(tmp_path: Path) -> None:
    """Datasets in memory and saved to a folder; a damaged image is one error."""
    datasets = pytest.importorskip("datasets")
    contents = [*CONTENT[:3], b"no image"]
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
        (lambda p: p.write_bytes(b"PAR1" * 9), "is damaged or no Parquet file"),
        (lambda p: write_table(p, contents=["a", "b"], bare=True), "no images in"),
        (lambda p: write_table(p, contents=[]), "no images in"),
    ],
    ids=["damaged", "words", "empty"],
)
def test_tables_that_are_none(make: Any, said: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    make(tmp_path / "a.parquet")
    assert said in complaint(InputError, lambda: as_source(tmp_path / "a.parquet"))


def test_a_table_names_no_files(tmp_path: Path) -> None:
    """A row without bytes is an error; its path is not opened."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    (tmp_path / "secret.png").write_bytes(CONTENT[0])
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": None, "path": str(tmp_path / "secret.png")}], kind)
    pyarrow.parquet.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
    source = as_source(tmp_path / "a.parquet")
    assert "holds a path and no image bytes" in complaint(ImageError, lambda: source.load(0))


def test_sparse_members_are_what_they_hold(tmp_path: Path) -> None:
    """GNU tar -S leaves out runs of zeros in three ways; the reader restores them."""
    image = np.zeros((400, 400, 3), np.uint8)
    image[:30], image[300:310] = photo(30, 400), photo(10, 400, seed=1)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "BMP")
    contents = [stream.getvalue(), CONTENT[0]]
    with open(tmp_path / "0.bmp", "wb") as file:
        for start in range(0, len(contents[0]), 4096):
            block = contents[0][start : start + 4096]
            file.seek(start)
            if any(block):
                file.write(block)
        file.truncate(len(contents[0]))
    (tmp_path / "1.png").write_bytes(contents[1])
    for form in ("gnu", "posix", "pax --sparse-version=0.0", "pax --sparse-version=0.1"):
        options = [*f"--format={form}".split(), "-S", "-cf", f"{tmp_path}/s.tar", "-C", str(tmp_path), "0.bmp", "1.png"]
        if shutil.which("tar") is None or subprocess.run(["tar", *options], capture_output=True).returncode:
            pytest.skip("no GNU tar here")
        source = as_source(tmp_path / "s.tar")
        assert source._pieces or form == "gnu"  # type: ignore[attr-defined]  # not every disk keeps holes
        assert same(source, contents) and same(pickle.loads(pickle.dumps(source)), contents)


def test_what_is_left_out_of_a_folder_or_an_archive_is_counted(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "in").mkdir()
    for name in ("0.png", "1.PNG", "a.txt", "b.txt", "c.psd", "none"):
        (tmp_path / "in" / name).write_bytes(CONTENT[0])
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        archive.add(tmp_path / "in", "in")
    for given in (tmp_path / "in", tmp_path / "in.tar"):
        caplog.clear()
        assert len(as_source(given)) == 2
        assert "4 other files (2 .txt, 1 " in caplog.text and caplog.text.count("left out") == 1


# Archives that lead nowhere


def header(name: bytes, size: int, kind: bytes = b"0") -> bytes:
    """A tar header, with a size that may be negative or arbitrarily large."""
    found = bytearray(512)
    found[: len(name)] = name
    found[100:108] = found[108:116] = found[116:124] = b"0000644\0"
    plain = 0 <= size < 8**11
    found[124:136] = (
        b"%011o\0" % size if plain else bytes((0x80 if size >= 0 else 0xFF,)) + size.to_bytes(11, "big", signed=True)
    )
    found[136:148], found[156:157], found[257:265], found[148:156] = b"00000000000\0", kind, b"ustar\00000", b" " * 8
    found[148:156] = b"%06o\0 " % sum(found)
    return bytes(found)


def record(name: str, value: str) -> bytes:
    """A block of a pax header."""
    line = f" {name}={value}\n".encode()
    length = len(line) + 2
    return (str(length).encode() + line).ljust(512, b"\0")


AHEAD = header(b"a.png", 0) + header(b"b.png", 0)
LOST: dict[str, bytes] = {
    "a member that goes back": AHEAD + header(b"c.png", -1024) + bytes(1024),
    "a member that goes back to the start": header(b"c.png", -512) + bytes(1024),
    "a folder that goes back": AHEAD + header(b"c/", -1024, b"5") + bytes(1024),
    "a pax size that goes back": AHEAD + header(b"x", 17, b"x") + record("size", "-1536") + header(b"c.png", 0),
    "a pax header of no length": AHEAD + header(b"x", -1, b"x") + bytes(1024),
    "a pax header of 1 TiB": AHEAD + header(b"x", 2**40, b"x") + bytes(1024),
    "a pax header for all of 16 GiB": AHEAD + header(b"x", 2**34, b"g") + bytes(1024),
    "a long name of 64 GiB": AHEAD + header(b"x", 2**36, b"L") + bytes(1024),
    "a long link of -1": AHEAD + header(b"x", -(2**40), b"K") + bytes(1024),
    "names without an end": header(b"x", 5, b"L") * 20_000 + bytes(1024),
    "a member of 2^80": AHEAD + header(b"c.png", 2**80) + bytes(1024),
    "an old sparse member that goes back": AHEAD + header(b"c.png", -2048, b"S") + bytes(1024),
    "nothing but zeros": bytes(10_240),
}


@pytest.mark.parametrize("case", LOST)
def test_an_archive_that_leads_nowhere_ends(case: str, tmp_path: Path) -> None:
    """A damaged archive gives an error or the images before the damage; it never loops or uses up memory."""
    path = tmp_path / "a.tar"
    path.write_bytes(LOST[case])
    try:
        source = as_source(path)
    except InputError as error:
        assert str(path) in str(error)
        return
    assert len(source) <= 3
    for number in range(len(source)):
        complaint(ImageError, lambda number=number: source.load(number))


# Tables that are far more in memory


def _held() -> int:
    """Bytes of memory in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is counted by Linux")
@pytest.mark.parametrize("nested", [False, True], ids=["bytes", "struct"])
def test_one_image_stored_for_many_rows_is_kept_once(nested: bool, tmp_path: Path) -> None:
    """A table of 200 KB whose rows would take 40 GB."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    count, large = 200_000, CONTENT[0] + np.random.default_rng(0).bytes(200_000)
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([large], pa.binary()))
    if nested:
        column = pa.StructArray.from_arrays([column, pa.array([None] * count, pa.string())], ["bytes", "path"])
    parquet.write_table(pa.table({"image": column}), tmp_path / "a.parquet", store_schema=False)
    assert (tmp_path / "a.parquet").stat().st_size < 300_000
    before = _held()
    source = as_source(tmp_path / "a.parquet")
    assert len(source) == count and source.image(count - 1) == large
    assert torch.equal(source.load(7).image, load_image(CONTENT[0])) and _held() - before < 2**28


@pytest.mark.parametrize("compression", ["snappy", "gzip", "zstd", "brotli", "lz4"])
def test_a_table_that_expands_is_refused(compression: str, tmp_path: Path) -> None:
    """Kilobytes of zeros that would take 400 MB, and an impossible number of rows."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = pa.array([bytes(20_000_000)] * 20, pa.large_binary())
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"image": rows}), path, compression=compression, use_dictionary=False)
    assert "unpacks" in complaint(InputError, lambda: as_source(path))
    parquet.write_table(pa.table({"image": pa.nulls(2**24 + 1, pa.binary())}), path, row_group_size=2**25)
    assert path.stat().st_size < 100_000 and "unpacks" in complaint(InputError, lambda: as_source(path))
