"""Rows of vectors in files: .npy, .safetensors, .parquet.

One schema: path, embedding, grid, error.  In Parquet these are columns; beside the other two a .jsonl holds a line
with row, path, grid and error for each.  A picture that could not be read has a row of NaN.

What is read again is the name of the file, whatever bytes it has.  JSON escapes those that are not UTF-8; in Parquet
each of them is written as \\x and two digits, and in such a path, or one that holds \\x itself, so is the backslash.
"""

import contextlib
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ...errors import InputError
from ...images.containers import pyarrow
from ...system import whole as _whole
from ..vectors import Array

__all__ = ["FORMATS", "Format", "Rows", "whole"]

KEY = "dinov3_infer"  # of the recipe in a file's metadata
whole = partial(_whole, flush=True)  # a run goes on with the shards that it finds


@dataclass
class Rows:
    """Neighbours, of which the first is picture number `first`."""

    first: int
    vectors: Array | list[Array | None]  # [n, *shape]; a list where each row has a shape of its own
    dtype: str
    paths: list[str | None] = field(default_factory=list)
    grids: list[tuple[int, int] | None] = field(default_factory=list)  # (h, w) in patches
    errors: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.paths)


class Format(ABC):
    """A kind of file.  The file with the vectors is written last, so that where it is, all is."""

    suffix: str
    sides: tuple[str, ...] = ()  # suffixes of what lies beside a file
    ragged = False  # whether rows may differ in shape

    @abstractmethod
    def write(self, target: Path, rows: Rows, recipe: str) -> None: ...

    @abstractmethod
    def join(self, target: Path, parts: Sequence[Path], count: int, recipe: str) -> None:
        """One file of all rows, `count` in all."""

    @abstractmethod
    def vectors(self, path: Path) -> Array:
        """[n, *shape], mapped and not read where the format allows it."""

    @abstractmethod
    def recipe(self, path: Path) -> str | None:
        """As it was given to `join`; None where there is none."""

    def listing(self, path: Path) -> Iterator[tuple[str | None, str]]:
        """(path, error) of every row."""
        with open(path.with_suffix(".jsonl"), encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                yield row["path"], row["error"]

    def remove(self, path: Path) -> None:
        for name in (path, *(path.with_suffix(side) for side in self.sides)):
            name.unlink(missing_ok=True)


def _write_listing(target: Path, rows: Rows) -> None:
    with whole(target.with_suffix(".jsonl")) as beside, open(beside, "w", encoding="utf-8") as lines:
        for i, (path, grid, error) in enumerate(zip(rows.paths, rows.grids, rows.errors, strict=True)):
            lines.write(json.dumps(dict(row=rows.first + i, path=path, grid=grid, error=error)) + "\n")


def _join_listings(target: Path, parts: Sequence[Path]) -> None:
    with whole(target.with_suffix(".jsonl")) as beside, open(beside, "wb") as lines:
        for part in parts:
            with open(part.with_suffix(".jsonl"), "rb") as found:
                shutil.copyfileobj(found, lines)


def _append(stream: BinaryIO, vectors: Array) -> None:
    """In pieces: a mapped array goes through memory without staying there."""
    step = max(1, (1 << 24) // max(1, vectors[:1].nbytes))
    for first in range(0, len(vectors), step):
        stream.write(np.ascontiguousarray(vectors[first : first + step]).data)


class Npy(Format):
    suffix, sides = ".npy", (".jsonl", ".json")

    def write(self, target: Path, rows: Rows, recipe: str) -> None:
        _write_listing(target, rows)
        vectors = np.ascontiguousarray(rows.vectors)
        header = np.lib.format.header_data_from_array_1_0(vectors)
        with whole(target) as beside, open(beside, "wb") as stream:  # numpy would not say why a disk takes no more
            np.lib.format.write_array_header_1_0(stream, header)
            _append(stream, vectors)

    def join(self, target: Path, parts: Sequence[Path], count: int, recipe: str) -> None:
        _join_listings(target, parts)
        with whole(target.with_suffix(".json")) as beside:
            beside.write_text(recipe, encoding="utf-8")
        first = self.vectors(parts[0])
        header = dict(descr=first.dtype.str, fortran_order=False, shape=(count, *first.shape[1:]))
        with whole(target) as beside, open(beside, "wb") as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for part in parts:
                _append(stream, self.vectors(part))

    def vectors(self, path: Path) -> Array:
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
        except (ValueError, EOFError, OSError):
            raise InputError(f"'{path}' is no whole .npy file; remove it and run embed again") from None

    def recipe(self, path: Path) -> str | None:
        record = path.with_suffix(".json")
        return record.read_text(encoding="utf-8") if record.is_file() else None


class Safetensors(Format):
    suffix, sides = ".safetensors", (".jsonl",)

    def write(self, target: Path, rows: Rows, recipe: str) -> None:
        _write_listing(target, rows)
        with whole(target) as beside:
            save_file({"embedding": np.ascontiguousarray(rows.vectors)}, beside, {KEY: recipe})

    def join(self, target: Path, parts: Sequence[Path], count: int, recipe: str) -> None:
        _join_listings(target, parts)
        with safe_open(parts[0], "np") as first:
            found = first.get_slice("embedding")
            kind, shape = found.get_dtype(), [count, *found.get_shape()[1:]]
        length = int(np.prod(shape)) * (2 if kind == "F16" else 4)
        entry = dict(dtype=kind, shape=shape, data_offsets=[0, length])
        header = json.dumps({"__metadata__": {KEY: recipe}, "embedding": entry}).encode()
        header += b" " * (-len(header) % 8)
        with whole(target) as beside, open(beside, "wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            for part in parts:
                _append(stream, self.vectors(part))

    def vectors(self, path: Path) -> Array:
        try:
            with safe_open(path, "np") as content:
                found = content.get_slice("embedding")
                shape, kind = found.get_shape(), np.float16 if found.get_dtype() == "F16" else np.float32
            with open(path, "rb") as stream:
                offset = 8 + int.from_bytes(stream.read(8), "little")
        except (SafetensorError, OSError):
            raise InputError(f"'{path}' holds no vectors of embed; give what it has written") from None
        return np.memmap(path, kind, "r", offset, tuple(shape)) if shape[0] else np.zeros(shape, kind)

    def recipe(self, path: Path) -> str | None:
        try:
            with safe_open(path, "np") as content:
                return (content.metadata() or {}).get(KEY)
        except (SafetensorError, OSError):
            return None


class Parquet(Format):
    suffix, ragged = ".parquet", True

    def __init__(self) -> None:
        self._arrow = pyarrow("a .parquet file")

    def write(self, target: Path, rows: Rows, recipe: str) -> None:
        arrow, count = self._arrow, len(rows)
        vectors = rows.vectors
        if isinstance(vectors, list):
            flat = [np.zeros(0, rows.dtype) if v is None else v.ravel() for v in (*vectors, None)]
            ends = np.cumsum([0, *(v.size for v in flat[:-1])], dtype=np.int64)
            column = arrow.LargeListArray.from_arrays(ends, np.concatenate(flat))
        else:  # from the flat buffer: through Python's lists it takes ten times as long
            width = int(np.prod(vectors.shape[1:]))
            column = arrow.FixedSizeListArray.from_arrays(arrow.array(vectors.reshape(-1)), width)
        columns = dict(
            path=arrow.array(list(map(_spelled, rows.paths)), arrow.string()),
            embedding=column,
            grid=arrow.array([None if g is None else list(g) for g in rows.grids], arrow.list_(arrow.int32(), 2)),
            error=arrow.array([e.encode("utf-8", "backslashreplace").decode() for e in rows.errors], arrow.string()),
        )
        table = arrow.table(columns, metadata={KEY: recipe})
        with whole(target) as beside:
            arrow.parquet.write_table(table, beside, row_group_size=max(1, count), **_AS_IT_IS)

    def join(self, target: Path, parts: Sequence[Path], count: int, recipe: str) -> None:
        arrow = self._arrow
        schema = arrow.parquet.read_schema(parts[0]).with_metadata({KEY: recipe})
        with whole(target) as beside, arrow.parquet.ParquetWriter(beside, schema, **_AS_IT_IS) as writer:
            for part in parts:
                writer.write_table(arrow.parquet.read_table(part, schema=schema))

    def vectors(self, path: Path) -> Array:
        column = self._arrow.parquet.read_table(path, columns=["embedding"]).column(0).combine_chunks()
        if not self._arrow.types.is_fixed_size_list(column.type):
            raise InputError(f"the rows of '{path}' differ in shape; give vectors of kind 'embedding'")
        flat: Array = column.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(column), -1)

    def recipe(self, path: Path) -> str | None:
        try:
            found = self._arrow.parquet.read_schema(path).metadata or {}
        except (OSError, self._arrow.ArrowException):
            return None
        return found[KEY.encode()].decode() if KEY.encode() in found else None

    def listing(self, path: Path) -> Iterator[tuple[str | None, str]]:
        for batch in self._arrow.parquet.ParquetFile(path).iter_batches(columns=["path", "error"]):
            yield from zip(map(_path, batch.column(0).to_pylist()), batch.column(1).to_pylist(), strict=True)


# vectors do not compress, and looking them up in a dictionary takes longer than reading them
_AS_IT_IS: dict[str, Any] = dict(use_dictionary=["path"], compression="none")


def _spelled(path: str | None) -> str | None:
    """As UTF-8, which Parquet wants."""
    if path is None:
        return None
    try:
        content = os.fsencode(path)
    except UnicodeEncodeError:  # no file is called that
        content = path.encode("utf-8", "surrogatepass")
    with contextlib.suppress(UnicodeDecodeError):
        if b"\\x" not in content:
            return content.decode()
    return content.replace(b"\\", b"\\x5c").decode("utf-8", "backslashreplace")


def _path(spelled: str | None) -> str | None:
    if spelled is None or "\\x" not in spelled:
        return spelled
    found = re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes.fromhex(match[1].decode()), spelled.encode())
    return os.fsdecode(found)


FORMATS: dict[str, type[Format]] = {kind.suffix: kind for kind in (Npy, Safetensors, Parquet)}
