"""Images to train on: folders, lists, archives, Datasets."""

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import complaint, photo
from PIL import Image
from shades import Shades, shades, write

from dinov3_infer.errors import Dinov3Error, ImageError, InputError, InputTypeError, MissingFileError
from dinov3_infer.train.batches import open_data


def test_folder(tmp_path: Path) -> None:
    """A folder gives all formats, recursively, in the order of names, without hidden files and other files."""
    for i, name in enumerate(("a.png", "b/c.JPG", "b/d/e.ppm", "f.tiff", "g.bmp")):
        write(tmp_path / name, 10 * i)
    for name in (".hidden.png", ".thumbnails/x.png"):
        write(tmp_path / name, 99)
    (tmp_path / "notes.txt").write_text("no picture")
    data = open_data(tmp_path)
    assert shades(data) == [0, 10, 20, 30, 40]
    assert data.labels is None
    assert data[1].shape == (3, 30, 40) and data[1].dtype == torch.uint8
    with pytest.raises(IndexError):
        data[5]


def test_links_are_followed_once(tmp_path: Path) -> None:
    """A linked folder is read; a link to a parent folder does not loop."""
    write(tmp_path / "real/a.png", 1)
    (tmp_path / "set").mkdir()
    (tmp_path / "set/there").symlink_to(tmp_path / "real")
    (tmp_path / "set/loop").symlink_to(tmp_path / "set")
    assert len(open_data(tmp_path / "set")) == 1


@pytest.mark.parametrize(
    "names, classes, labels",
    [
        (("cat/1.png", "cat/x/2.png", "dog/3.png"), ["cat", "dog"], [0, 0, 1]),
        (("train/dog/1.png", "train/eel/2.png"), ["dog", "eel"], [0, 1]),
        (("cat/1.png", "2.png"), [], None),
        (("all/1.png", "all/2.png"), [], None),
        (("1.png", "2.png"), [], None),
    ],
    ids=lambda v: "-".join(map(str, v or ["none"])).replace("/", "|"),
)
def test_labels_of_folders(tmp_path: Path, names: tuple[str, ...], classes: list[str], labels: Any) -> None:
    """Labels are the first folder names that differ; there are none if an image has no such folder."""
    for name in names:
        write(tmp_path / name, 0)
    data = open_data(tmp_path)
    assert (data.labels if labels is None else data.labels.tolist()) == labels
    assert data.classes == classes


def test_list_file(tmp_path: Path) -> None:
    """Paths are absolute or relative to the list; labels follow a tab."""
    write(tmp_path / "images/a.png", 1)
    absolute = write(tmp_path / "b.png", 2)
    listed = tmp_path / "lists/some.txt"
    listed.parent.mkdir()
    listed.write_text(f"../images/a.png\tfrog\n\n{absolute}\tant\n")
    data = open_data(listed)
    assert shades(data) == [1, 2]
    assert data.classes == ["ant", "frog"] and data.labels.tolist() == [1, 0]


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 20), (shade,) * 3).save(stream, "PNG")
    return stream.getvalue()


def test_tar(tmp_path: Path) -> None:
    """Images are read by number, also those with long names; labels come from .cls files or folders."""
    members = {f"{i:03}.png": png(i) for i in (5, 6, 7)} | {"x" * 120 + "/9.png": png(9), "notes.json": b"{}"}
    data = open_data(tar(tmp_path / "a.tar", members))
    assert [int(data[i][0, 0, 0]) for i in (3, 1, 2, 0)] == [9, 6, 7, 5]
    assert data.labels is None
    classes = {
        f"{i}.{kind}": png(i) if kind == "png" else str(i % 2).encode() for i in range(3) for kind in ("png", "cls")
    }
    assert open_data(tar(tmp_path / "b.tar", classes)).labels.tolist() == [0, 1, 0]
    assert open_data(tar(tmp_path / "c.tar", {"cat/1.png": png(1), "dog/1.png": png(2)})).classes == ["cat", "dog"]


@pytest.mark.parametrize(
    "item",
    [
        Image.new("RGB", (8, 8), (51,) * 3),
        np.full((8, 8, 3), 51, np.uint8),
        (torch.full((3, 8, 8), 50.7 / 255), 7),
        {"image": Image.new("L", (8, 8), 51), "label": 7},
    ],
    ids=["PIL", "array", "float tensor with label", "mapping"],
)
def test_dataset(item: Any) -> None:
    """Each form of an item of a Dataset gives the same pixels."""

    class One(Shades):
        def __getitem__(self, index: int) -> Any:
            return item

    pixels = open_data(One(3))[2]
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 8, 8) and (pixels == 51).all()


def test_a_dataset_that_cannot_read_an_image() -> None:
    """The error is that of a file; any other exception of a Dataset passes unchanged."""

    class Failing(Shades):
        def __getitem__(self, index: int) -> Any:
            return Image.open(io.BytesIO(b"no picture")) if index else 1 / 0

    data = open_data(Failing(2))
    assert "cannot read item 1 of Failing: cannot identify" in complaint(ImageError, lambda: data[1])
    with pytest.raises(ZeroDivisionError):
        data[0]


def test_labels_and_arrays(tmp_path: Path) -> None:
    """An array [N, H, W, 3] is a Dataset; `targets` are labels; a source without labels removes those of all."""
    labelled = Shades(3)
    for targets in ([2, 0, 2], torch.tensor([2, 0, 2])):
        labelled.targets = targets
        assert open_data(labelled).labels.tolist() == [1, 0, 1]
    array = np.stack([photo(8, 8, seed) for seed in range(4)])
    both = open_data([array, labelled])
    assert len(both) == 7 and both.labels is None
    assert torch.equal(both[2], torch.from_numpy(array[2]).permute(2, 0, 1))


def test_large_jpegs_are_decoded_smaller(tmp_path: Path) -> None:
    """They are at least of the requested size, upright, and show the same."""
    path = tmp_path / "large.jpg"
    photograph = Image.fromarray(photo(900, 1600)).resize((1600, 900), box=(0, 0, 160, 90))
    exif = Image.Exif()
    exif[274] = 6  # lies on its side
    photograph.save(path, quality=95, exif=exif)
    data = open_data(tmp_path)
    whole, small = data[0], data.read(0, 430)
    assert whole.shape == (3, 1600, 900) and small.shape == (3, 800, 450)
    assert data.read(0, 451).shape == whole.shape
    shrunk = torch.nn.functional.interpolate(whole[None], size=(800, 450), mode="bilinear", antialias=True)[0]
    assert (small.float() - shrunk.float()).abs().mean() < 2


# --- what is wrong with data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, error, said",
    [
        (lambda p: p / "nowhere", MissingFileError, "does not exist; check the path of the data"),
        (lambda p: p, InputError, "which holds no files"),
        (lambda p: (p / "a.npy").write_text("") * 0 or p, InputError, "which holds 1 .npy"),
        (lambda p: write(p / "a.png", 0), InputError, "is a single image; give a folder"),
        (lambda p: tar(p / "a.tar", {"notes.txt": b"x"}), InputError, "no images in"),
        (lambda p: (p / "a.tar").write_bytes(b"x" * 3000) * 0 or p / "a.tar", InputError, "no uncompressed tar"),
        (lambda p: (p / "a.txt").write_text("\n") * 0 or p / "a.txt", InputError, "is empty; give one path per line"),
        (lambda p: 3, InputTypeError, "got int"),
        (lambda p: [], InputError, "data is empty"),
        (lambda p: Shades(0), InputError, "is empty"),
        (lambda p: "a:x:pure", InputError, "no number before ':pure'"),
        (lambda p: (Shades(2), 1.5), InputError, "pure batches is 1.5"),
        (lambda p: [(Shades(2), 0.7), (Shades(2), 0.4), Shades(2)], InputError, "0.7, 0.4"),
        (lambda p: [(Shades(2), 1.0), Shades(2)], InputError, "less than 1 if another source has none"),
        (lambda p: (Shades(2), 0.5), InputError, "else 1"),
    ],
    ids=["missing", "empty", "other files", "one image", "tar without", "no tar", "empty list", "type", "nothing",
         "empty Dataset", "no number", "above 1", "sum above 1", "no share left", "share left"],
)  # fmt: skip
def test_wrong_data(tmp_path: Path, make: Any, error: type[Dinov3Error], said: str) -> None:
    """The error is one sentence, before any training."""
    assert said in complaint(error, lambda: open_data(make(tmp_path)))


def test_a_tar_that_is_cut_short(tmp_path: Path) -> None:
    """A truncated archive is an error."""
    whole = tar(tmp_path / "a.tar", {f"{i}.png": png(i) + bytes(3000) for i in range(5)}).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:9000])
    assert "copy it again" in complaint(InputError, lambda: open_data(tmp_path / "a.tar"))


def test_pickles(tmp_path: Path) -> None:
    """The data can be pickled for workers, as systems without fork need it."""
    write(tmp_path / "a.png", 7)
    tar(tmp_path / "b.tar", {"1.png": png(9)})
    data = pickle.loads(pickle.dumps(open_data([tmp_path, tmp_path / "b.tar"])))
    assert shades(data) == [7, 9]


def test_bare_tensors_are_no_sources() -> None:
    """A list of images in memory would be read as a list of datasets, each row as an image."""
    with pytest.raises(InputTypeError, match="Tensor of 3 dimensions is no source; stack"):
        open_data([torch.zeros(3, 8, 8, dtype=torch.uint8)])  # type: ignore[list-item]
