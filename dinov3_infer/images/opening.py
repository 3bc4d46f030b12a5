"""Resolves what users name (folders, patterns, lists, archives, datasets) into numbered images in a fixed order."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import InputError, InputTypeError, MissingFileError
from .containers import Dataset, Table, Tar, streamed
from .decode import ImageLike, why_no_image
from .paths import (
    address_scheme,
    fixed_part,
    image_suffixes,
    is_collection,
    list_images,
    read_labelled_list,
    read_list,
)
from .sources import Files, Items, Numbered, Picked, Source, chained

__all__ = ["ARCHIVES", "LISTS", "as_source", "each_image", "find_images", "open_all", "open_images", "open_names"]

LISTS, ARCHIVES = (".txt", ".lst", ".tsv"), (".tar", ".parquet")
_ZIPPED = (".zip", ".7z", ".rar")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".gz", ".bz2", ".xz", ".zst")
_OTHERS = {  # unsupported suffixes -> what the file is, and what to give instead
    _ZIPPED: "an archive; unpack it, and give the folder",
    _COMPRESSED: "compressed; decompress it (gunzip, bunzip2, unxz, unzstd), and give the .tar",
    (".csv", ".json", ".jsonl", ".xlsx", ".xml"): (
        "a table; give a .txt list with one path per line, optionally with a tab and a label"
    ),
    (".npy", ".npz", ".h5", ".hdf5", ".mat", ".arrow", ".lmdb", ".mdb", ".tfrecord", ".safetensors", ".pt", ".pkl"): (
        "a file of arrays or records; read it in Python, and pass the arrays to Backbone.embed"
    ),
    (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"): "a video; give its frames",
    (".pdf", ".svg", ".eps", ".ps", ".ai"): "a document or drawing; make an image of each page",
}


def open_images(images: ImageLike | Iterable[ImageLike] | Source | Numbered) -> Source | Iterable[ImageLike]:
    """Open images as a numbered source if possible, else as a stream.

    Args:
        images: A path, folder, pattern, list file, archive, table, address, Dataset, an image, or an iterable of
            images.  Arrays are [H_px, W_px, 3] or [B, H_px, W_px, 3], tensors [3, H_px, W_px] or [B, 3, H_px, W_px].

    Raises: As in `as_source`.
    """
    if isinstance(images, Source):
        return images
    if isinstance(images, (str, os.PathLike)):
        return as_source(images)
    if hasattr(images, "to_list") and not hasattr(images, "cast_column"):  # a table column, whose index may not be
        images = images.to_list()  # 0, 1, 2, ...
    dataset = hasattr(images, "__getitem__") and hasattr(images, "__len__")
    if dataset and not isinstance(images, (Sequence, Mapping, np.ndarray, Tensor)):
        return Dataset(images)
    if hasattr(images, "cast_column"):  # a streaming Hugging Face dataset
        return streamed(images)
    found = each_image(images)  # type: ignore[arg-type]
    return Items(found) if isinstance(found, Sequence) else found


def open_all(given: Iterable[str | Source], base: str | None = None) -> Source:
    """Open several sources as one, in order.

    Args:
        given: Paths, patterns, addresses or sources.
        base: The folder that the files among them were found under, see `Source.base`.

    Raises: As in `as_source`.
    """
    sources: list[Source] = []
    for in_files, group in groupby(given, _is_file):  # runs of files, e.g. from a shell pattern
        if in_files:
            sources.append(Files(cast("Iterable[str]", group), base))
        else:
            sources += (one if isinstance(one, Source) else as_source(one) for one in group)
    return chained(sources)


def find_images(given: list[str]) -> Source:
    """Open the images named on a command line, in order.

    Each argument is a source, see `as_source`, or "@LIST" for the paths in a list file.

    Raises: As in `as_source`; MissingFileError or InputError for a list.
    """
    if len(given) == 1 and not given[0].startswith("@"):
        return as_source(given[0])
    return open_all(Files(read_list(text[1:])) if text.startswith("@") else text for text in given)


def _is_file(given: str | Source) -> bool:
    """Whether this is a single image: an address, or a file that is neither a list nor an archive."""
    if isinstance(given, Source):
        return False
    others = (*LISTS, *ARCHIVES, *_ZIPPED, *_COMPRESSED)
    return bool(address_scheme(given)) or (os.path.isfile(given) and not given.lower().endswith(others))


def as_source(spec: Any) -> Source:
    """Open a folder, pattern, list file (.txt .lst .tsv), tar archive, Parquet table, image, address, or a Dataset.

    A list file has one path per line, relative to the list file, optionally with a tab and a label.  Names that this
    package gives to images in archives and tables ("ARCHIVE.tar#MEMBER") may be listed too.

    Raises: MissingFileError; InputError if there are no images, the archive is damaged or the file is something else;
    InputTypeError.
    """
    if not isinstance(spec, (str, os.PathLike)):
        return _open_dataset(spec)
    text = os.path.expanduser(os.fsdecode(spec))
    if not text:  # such as an unset shell variable; it must not mean the current folder
        raise MissingFileError("a source is an empty path; give an image, folder or pattern")
    if address_scheme(text):
        return Files([text])
    path = Path(text)
    if (path / "state.json").is_file():
        return _open_dataset(_saved_dataset(path))
    if is_collection(path):
        found, base = list_images(path), fixed_part(path)
        mixed = not path.is_dir() and any(name.lower().endswith((*LISTS, *ARCHIVES)) for name in found)
        return open_all(found, base) if mixed else Files(found, base)
    if not path.is_file():
        raise MissingFileError(f"no image, folder or pattern at '{path.absolute()}'; check the path")
    suffix = path.suffix.lower()
    if suffix in LISTS:
        return _open_list(path)
    if suffix == ".tar":
        return Tar(path)
    if suffix == ".parquet":
        return Table(path)
    for suffixes, what in _OTHERS.items():
        if path.name.lower().endswith(suffixes):
            raise InputError(f"'{path}' is {what}")
    if suffix not in image_suffixes() and (reason := why_no_image(path)):
        raise InputError(f"'{path}' {reason}")
    return Files([text])


def each_image(images: ImageLike | Iterable[ImageLike]) -> Iterable[ImageLike]:
    """Turn one image, a 4-dimensional batch or any iterable of images into an iterable of images that are not yet read.

    A folder or a pattern becomes the list of its images, see `list_images`; an array of paths becomes a list of paths.

    Raises: MissingFileError or InputError for a folder or pattern without images, InputTypeError for other types.
    """
    if is_collection(images):
        return list_images(images)  # type: ignore[arg-type]
    if isinstance(images, (Tensor, np.ndarray)) and images.ndim == 4:
        return list(images)
    if isinstance(images, np.ndarray) and images.ndim == 1 and images.dtype.kind in "OU":  # a table column
        return images.tolist()  # type: ignore[no-any-return]
    single = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, Tensor, np.ndarray)
    if isinstance(images, single) or hasattr(images, "read"):
        return [images]  # type: ignore[list-item]
    if not isinstance(images, Iterable) or isinstance(images, Mapping):
        raise InputTypeError(
            f"images are a path, PIL image, array, tensor or a list of these; got {type(images).__name__}"
        )
    return images


def _open_dataset(spec: Any) -> Source:
    if not (hasattr(spec, "__getitem__") and hasattr(spec, "__len__")):
        raise InputTypeError(f"data is a path, or a Dataset with __len__ and __getitem__; got {type(spec).__name__}")
    if isinstance(spec, (Tensor, np.ndarray)) and spec.ndim != 4:
        raise InputTypeError(
            f"a {type(spec).__name__} of {spec.ndim} dimensions is no source; stack images to [B, 3, H, W]"
        )
    if not len(spec):
        raise InputError(f"the {type(spec).__name__} is empty; give one that holds images")
    return Dataset(spec)


def _open_list(path: Path) -> Source:
    """Open a list file, see `as_source`."""
    names, labels = read_labelled_list(path)
    source = open_names([name if address_scheme(name) else str(path.parent / name) for name in names], str(path))
    source.labels = labels
    return source


def open_names(names: Sequence[str], origin: str) -> Source:
    """Open images by the names that `Source.key` gave them; `origin` is the list that holds the names.

    Raises: As in `as_source`; MissingFileError for a name that is in no archive.
    """
    if not any(_INSIDE.fullmatch(name) for name in names):
        return Files(names)
    sources: list[Source] = []
    opened: dict[str, tuple[int, dict[str | None, int]]] = {}  # archive -> its number, {key: index}
    places = []
    for name in names:
        found = _INSIDE.fullmatch(name)
        if found is None or os.path.exists(name):
            places.append((len(sources), 0))
            sources.append(Files([name]))
            continue
        if found[1] not in opened:
            source = as_source(found[1])
            opened[found[1]] = len(sources), {source.key(i): i for i in range(len(source))}
            sources.append(source)
        which, numbers = opened[found[1]]
        if name not in numbers:
            raise MissingFileError(
                f"no image '{found[2]}' in '{found[1]}', which '{origin}' lists; write the list again"
            )
        places.append((which, numbers[name]))
    return Picked(sources, places)


_INSIDE = re.compile(r"(.+\.(?:tar|parquet))#(.+)", re.DOTALL | re.IGNORECASE)


def _saved_dataset(folder: Path) -> Any:
    try:
        from datasets import load_from_disk  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise InputError(
            f"'{folder}' holds a Hugging Face dataset; pip install datasets, or give it as Parquet"
        ) from None
    return load_from_disk(str(folder))
