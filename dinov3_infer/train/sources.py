"""Pictures to train on, by number: folders, list files, tar archives, any torch Dataset, and mixtures of them."""

import contextlib
import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ImageError, InputError, InputTypeError, MissingFileError
from ..images import load_image

__all__ = ["Data", "Spec", "open_data"]

Spec: TypeAlias = Any  # a path, "PATH:PROBABILITY:pure", a torch Dataset, or a pair (one of these, probability)

LISTS = (".txt", ".lst", ".tsv")
UNREADABLE = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows these formats by name only


class Source(Protocol):
    """Numbered pictures of one origin."""

    name: str
    labels: list[str] | None  # class of each picture

    def __len__(self) -> int: ...

    def read(self, index: int, short_px: int) -> Tensor:
        """uint8 [3, H, W].  A JPEG may come at half, quarter or eighth scale while no side is below `short_px`.

        Raises: ImageError for a picture that cannot be read.
        """
        ...


class Files:
    """Pictures in files of their own.  Names are kept as one array: lists of a million strings grow in every worker."""

    def __init__(self, name: str, root: Path, paths: Sequence[str], labels: list[str] | None) -> None:
        self.name, self.labels = name, labels
        self._root = root
        self._paths = np.array([os.fsencode(path) for path in paths])

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int, short_px: int) -> Tensor:
        path = self._root / os.fsdecode(self._paths[index])
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ImageError(f"cannot read '{path}': {error.strerror}; check the path") from None
        return _decode(content, f"'{path}'", short_px)


class Tar:
    """Pictures in a tar archive, each found by the place that an index gives, which is built when it is opened."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        names, spans, classes = [], [], {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    stem, suffix = os.path.splitext(member.name)
                    if not member.isfile() or os.path.basename(stem).startswith("."):
                        continue
                    if suffix.lower() in _suffixes():
                        names.append(member.name)
                        spans.append((member.offset_data, member.size))
                    elif suffix == ".cls" and (text := archive.extractfile(member)):
                        classes[stem] = text.read().decode("utf-8", "replace").strip()
        except tarfile.ReadError as error:
            raise InputError(
                f"'{path}' is no whole uncompressed tar archive ({error}); copy it again, or decompress it"
            ) from None
        if not names:
            raise InputError(f"no pictures in '{path}'; give an archive that holds some")
        stems = [os.path.splitext(name)[0] for name in names]
        self.labels = [classes[s] for s in stems] if all(s in classes for s in stems) else _folder_labels(names)
        self._names = np.array([os.fsencode(name) for name in names])
        self._spans = np.array(spans)

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, index: int, short_px: int) -> Tensor:
        label = f"'{os.fsdecode(self._names[index])}' in '{self._path}'"
        offset, size = (int(v) for v in self._spans[index])
        try:
            with open(self._path, "rb") as stream:
                stream.seek(offset)
                content = stream.read(size)
        except OSError as error:
            raise ImageError(f"cannot read {label}: {error.strerror}; check the path") from None
        return _decode(content, label, short_px)


class Wrapped:
    """A torch Dataset: its items are pictures, (picture, ...) or {"image": picture, ...}."""

    def __init__(self, dataset: Any) -> None:
        self.name = type(dataset).__name__
        self._dataset = dataset
        self.labels = [str(label) for label in np.asarray(getattr(dataset, "targets", ())).tolist()] or None

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int, short_px: int) -> Tensor:
        try:
            item = self._dataset[index]
        except OSError as error:  # of Pillow too
            reason = error.strerror or str(error).split("<")[0].strip()
            raise ImageError(f"cannot read item {index} of {self.name}: {reason}; check that item") from None
        if isinstance(item, Mapping):
            item = next((item[key] for key in ("image", "img", "jpg", "png") if key in item), item)
        elif isinstance(item, (tuple, list)) and item:
            item = item[0]
        image = load_image(item, f"item {index} of {self.name}")
        return image if image.dtype == torch.uint8 else image.mul(255.0).round_().to(torch.uint8)


class Data:
    """Pictures of all sources under one numbering; what `open_data` gives."""

    def __init__(self, sources: Sequence[Source], pure: Sequence[float]) -> None:
        """`pure`: for each source the probability of a batch out of it alone; 0 where it is one of the mixed ones."""
        if sum(pure) > 1 or (not all(pure) and sum(pure) == 1) or (all(pure) and sum(pure) < 1):
            raise InputError(
                f"pure batches have probabilities {', '.join(f'{p:g}' for p in pure if p)}; they add up to less than 1 "
                "beside a source without one, else to 1"
            )
        self.sources, self.pure = tuple(sources), tuple(pure)
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Tensor:
        """uint8 [3, H_px, W_px].  Raises: ImageError for a picture that cannot be read, IndexError."""
        return self.read(index)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def read(self, index: int, short_px: int = 0) -> Tensor:
        """The same; with `short_px` a JPEG may come smaller, by a power of two, while no side is below that."""
        which = self.source_of(index)
        return self.sources[which].read(index - self.range_of(which)[0], short_px)

    def source_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        return int(np.searchsorted(self._ends, index, side="right"))

    def range_of(self, which: int) -> range:
        """Numbers of the pictures of a source."""
        end = int(self._ends[which])
        return range(end - len(self.sources[which]), end)

    @property
    def classes(self) -> list[str]:
        """Names of the labels, sorted; empty where not every picture has one."""
        found: set[str] = set()
        for source in self.sources:
            if source.labels is None:
                return []
            found.update(source.labels)
        return sorted(found)

    @property
    def labels(self) -> Tensor | None:
        """[N] int64, indices into `classes`; None where not every picture has one or all have the same."""
        number = {name: i for i, name in enumerate(self.classes)}
        if len(number) < 2:
            return None
        return torch.tensor([number[label] for source in self.sources for label in source.labels or ()])


def open_data(specs: Spec | Sequence[Spec]) -> Data:
    """One source or a list of them: a folder (looked through to the bottom), a list file (.txt: a path per line, from
    where the list lies, and a label after a tab if you have one), a tar archive, or a torch Dataset.

    "PATH:0.1:pure", or a pair (source, 0.1), takes a tenth of the batches from that source alone; the other batches
    are mixed from all sources without such a number, in proportion to their pictures.

    Raises: MissingFileError, InputError (no pictures, damaged archive, probabilities), InputTypeError.
    """
    given = specs if isinstance(specs, list) or (isinstance(specs, tuple) and not _is_pair(specs)) else [specs]
    if not given:
        raise InputError("no data was given; give a folder of pictures")
    pairs = [_probability(spec) for spec in given]
    return Data([_open(spec) for spec, _ in pairs], [probability for _, probability in pairs])


def _is_pair(spec: Any) -> bool:
    return isinstance(spec, tuple) and len(spec) == 2 and isinstance(spec[1], (int, float))


def _probability(spec: Spec) -> tuple[Any, float]:
    probability: float
    if isinstance(spec, str) and (found := re.fullmatch(r"(.+):([^:]*):pure", spec)):
        try:
            spec, probability = found[1], float(found[2])
        except ValueError:
            raise InputError(f"'{spec}' has no number before ':pure'; write PATH:0.1:pure") from None
    elif _is_pair(spec):
        spec, probability = spec
    else:
        return spec, 0.0
    if not 0 < probability <= 1:
        raise InputError(f"a share of pure batches lies above 0 and up to 1; got {probability:g}")
    return spec, probability


def _open(spec: Any) -> Source:
    if not isinstance(spec, (str, os.PathLike)):
        if not (hasattr(spec, "__getitem__") and hasattr(spec, "__len__")):
            raise InputTypeError(
                f"data is a path or a Dataset with a length and items by number; got {type(spec).__name__}"
            )
        if isinstance(spec, (Tensor, np.ndarray)) and spec.ndim != 4:
            raise InputTypeError(
                f"a {type(spec).__name__} of {spec.ndim} dimensions is no source; stack pictures to [B, 3, H, W]"
            )
        if not len(spec):
            raise InputError(f"the {type(spec).__name__} is empty; give one that holds pictures")
        return Wrapped(spec)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise MissingFileError(f"no data at '{path.absolute()}'; check the path")
    if path.suffix.lower() in LISTS:
        return _open_list(path)
    if path.suffix.lower() in _suffixes():
        raise InputError(f"'{path}' is one picture; give a folder of them, or a list in a .txt file")
    return Tar(path)


def _open_folder(folder: Path) -> Source:
    paths = sorted(_walk(folder))
    pictures = [path for path in paths if os.path.splitext(path)[1].lower() in _suffixes()]
    if not pictures:
        kinds = Counter(os.path.splitext(path)[1] or "no extension" for path in paths)
        held = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(3)) or "no files"
        raise InputError(f"no pictures in '{folder}', which holds {held}; give a folder of pictures, or its tar files")
    return Files(str(folder), folder, pictures, _folder_labels(pictures))


def _walk(folder: Path) -> Iterator[str]:
    """Files under a folder, by their path from there; links are followed once, hidden ones are left out."""
    seen = set()
    for where, folders, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(where))
        folders[:] = [f for f in folders if f[0] != "." and os.path.realpath(os.path.join(where, f)) not in seen]
        inside = os.path.relpath(where, folder)
        yield from (file if inside == "." else os.path.join(inside, file) for file in files if file[0] != ".")


def _open_list(path: Path) -> Source:
    try:
        lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise InputError(f"'{path}' is not a list in UTF-8; give one path per line") from None
    if not lines:
        raise InputError(f"the list '{path}' is empty; give one path per line")
    labels = [line[1].strip() for line in lines] if all(len(line) > 1 for line in lines) else None
    return Files(str(path), path.parent, [line[0].strip() for line in lines], labels)


def _folder_labels(paths: Iterable[str]) -> list[str] | None:
    """The first folder in which the paths differ, as torchvision's ImageFolder has it; None where there is none."""
    parents = [os.path.dirname(path).replace(os.sep, "/").split("/") for path in paths]
    common = len(os.path.commonprefix(parents))
    if any(len(parent) <= common or not parent[0] for parent in parents):
        return None
    return [parent[common] for parent in parents]


@cache
def _suffixes() -> frozenset[str]:
    """File name extensions of the formats that Pillow reads."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in known.items() if kind in Image.OPEN and kind not in UNREADABLE)


def _decode(content: bytes, label: str, short_px: int) -> Tensor:
    if short_px and content.startswith(b"\xff\xd8"):  # decoded smaller, a photograph of 12 megapixels takes an eighth
        with (
            contextlib.suppress(OSError, Image.DecompressionBombError),  # which load_image puts into words
            Image.open(io.BytesIO(content)) as picture,
        ):
            picture.draft(None, (short_px, short_px))  # keeps the mode
            return load_image(picture, label)
    return load_image(content, label)
