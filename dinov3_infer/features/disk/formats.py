"""Files of vectors: .npy, .safetensors, .parquet.

All have one schema: path, embedding, grid, error, source (see `Source.identity`).  In Parquet these are columns.
Beside .npy and .safetensors a .jsonl holds row, path, grid, error and source of each row.  An image that could not be
read has a row of NaN.  Each file has a record of its settings and checksums (see `seals`), which lies inside .parquet
and .safetensors, and in a .json beside .npy.

A file name is read back exactly, whatever bytes it has.  JSON escapes bytes that are not UTF-8.  In Parquet such a byte
becomes \\x and two digits; in a path with such bytes, or with \\x itself, each backslash is escaped too.
"""

import contextlib
import json
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ...errors import InputError
from ...images.containers import pyarrow
from ...system import together as _together
from ..vectors import Array
from .recipe import Recipe
from .rows import Format, Line, Piece, Rows
from .seals import Seal, stamp

__all__ = ["FORMATS", "Format", "Line", "Piece", "Rows"]

KEY = "dinov3_infer"  # key of the record in a file's metadata
_Put = Callable[..., None]
together = partial(_together, flush=True)  # flushed, because a later run relies on the shards on disk


def _write_lines(rows: Rows, target: Path) -> None:
    with open(target, "w", encoding="utf-8") as lines:
        for i, line in enumerate(rows.lines):
            entry = dict(row=rows.first + i, path=line.path, grid=line.grid, error=line.error, source=line.source)
            lines.write(json.dumps(entry) + "\n")


def _join_lines(pieces: Sequence[Piece], target: Path) -> None:
    with open(target, "wb") as lines:
        for path, start, stop in pieces:
            with open(path.with_suffix(".jsonl"), "rb") as found:
                lines.writelines(islice(found, start, stop))


def _append(stream: BinaryIO, vectors: Array) -> None:
    """Writes in blocks, so that a mapped array is not loaded as a whole."""
    step = max(1, (1 << 24) // max(1, vectors[:1].nbytes))
    for first in range(0, len(vectors), step):
        stream.write(np.ascontiguousarray(vectors[first : first + step]).data)


class _Listed(Format):
    """Vectors in one file, and a list of rows in a .jsonl beside it."""

    def write(self, target: Path, rows: Rows, recipe: Recipe) -> None:
        vectors = np.ascontiguousarray(rows.vectors)
        put = partial(self._put, [vectors], vectors)
        images = range(rows.first, rows.first + len(rows))
        self._make(target, recipe, images, partial(_write_lines, rows), put)

    def join(self, target: Path, pieces: Sequence[Piece], recipe: Recipe) -> None:
        parts = (self.vectors(path)[start:stop] for path, start, stop in pieces)
        first, count = self.vectors(pieces[0].path), sum(stop - start for _, start, stop in pieces)
        self._make(target, recipe, range(count), partial(_join_lines, pieces), partial(self._put, parts, first))

    @abstractmethod
    def _make(self, target: Path, recipe: Recipe, images: range, lines: _Put, vectors: _Put) -> None: ...

    @abstractmethod
    def _put(self, parts: Any, like: Array, target: Path, count: int, record: str) -> None:
        """Writes arrays one after the other; `like`: an array with their dtype and row shape."""


class Npy(_Listed):
    """A .npy file with its record in a .json and its list in a .jsonl."""

    suffix, sides, sealed = ".npy", (".jsonl", ".json"), (".json", ".npy", ".jsonl")

    def _make(self, target: Path, recipe: Recipe, images: range, lines: _Put, vectors: _Put) -> None:
        names = [target.with_suffix(suffix) for suffix in (".jsonl", ".json", ".npy")]
        with together(*names) as (listing, record, made):
            lines(listing)
            vectors(made, len(images), "")
            seal = Seal.of(images, {".npy": made, ".jsonl": listing}, ".json")
            record.write_text(recipe.to_json(seal), encoding="utf-8")
            stamp(record, self.region(record))

    def _put(self, parts: Any, like: Array, target: Path, count: int, record: str) -> None:
        header = dict(descr=like.dtype.str, fortran_order=False, shape=(count, *like.shape[1:]))
        with open(target, "wb") as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for part in parts:
                _append(stream, part)

    def vectors(self, path: Path) -> Array:
        """[n, *shape], memory-mapped.  Raises: InputError for a damaged file."""
        try:
            found: Array = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(found, np.ndarray) or not found.ndim:
                raise ValueError
        except (ValueError, EOFError, OSError, SyntaxError, TypeError, OverflowError, MemoryError):
            raise InputError(f"'{path}' is not a complete .npy file; remove it and run embed again") from None
        return found

    def count(self, path: Path) -> int:
        return len(self.vectors(path))

    def stated(self, path: Path) -> bytes | None:
        record = path.with_suffix(".json")
        return record.read_bytes() if record.is_file() else None

    def region(self, path: Path) -> tuple[int, bytes]:
        return 0, path.with_suffix(".json").read_bytes()


class Safetensors(_Listed):
    """A .safetensors file with its record inside and its list in a .jsonl."""

    suffix, sides, sealed = ".safetensors", (".jsonl",), (".safetensors", ".jsonl")

    def _make(self, target: Path, recipe: Recipe, images: range, lines: _Put, vectors: _Put) -> None:
        with together(target.with_suffix(".jsonl"), target) as (listing, made):
            lines(listing)
            vectors(made, len(images), recipe.to_json(Seal.of(images, {".jsonl": listing}, self.suffix)))
            stamp(made, self.region(made))

    def _put(self, parts: Any, like: Array, target: Path, count: int, record: str) -> None:
        if isinstance(parts, list):
            save_file({"embedding": parts[0]}, target, {KEY: record})
            return
        kind = "F16" if like.dtype == np.float16 else "F32"
        shape = [count, *like.shape[1:]]
        entry = dict(dtype=kind, shape=shape, data_offsets=[0, int(np.prod(shape)) * like.dtype.itemsize])
        header = json.dumps({"__metadata__": {KEY: record}, "embedding": entry}).encode()
        header += b" " * (-len(header) % 8)
        with open(target, "wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            for part in parts:
                _append(stream, part)

    def _opened(self, path: Path) -> tuple[list[int], Any, str | None]:
        """Shape and dtype of the vectors, and the text of the record."""
        try:
            with safe_open(path, "np") as content:
                found, metadata = content.get_slice("embedding"), content.metadata() or {}
                kind = {"F16": np.float16, "F32": np.float32}[found.get_dtype()]
                return list(found.get_shape()), kind, metadata.get(KEY)
        except (SafetensorError, OSError, LookupError, ValueError):
            raise InputError(f"'{path}' was not written by embed; give a file that embed wrote") from None

    def vectors(self, path: Path) -> Array:
        """[n, *shape], memory-mapped.  Raises: InputError for a damaged file."""
        shape, kind, _ = self._opened(path)
        offset = 8 + len(self.region(path)[1])
        return np.memmap(path, kind, "r", offset, tuple(shape)) if shape[0] else np.zeros(shape, kind)

    def count(self, path: Path) -> int:
        return self._opened(path)[0][0]

    def stated(self, path: Path) -> bytes | None:
        found = self._opened(path)[2]
        return None if found is None else found.encode()

    def region(self, path: Path) -> tuple[int, bytes]:
        with open(path, "rb") as stream:
            return 8, stream.read(int.from_bytes(stream.read(8), "little"))


class Parquet(Format):
    """A .parquet file with its record and its list inside.  Raises: UnsupportedError without pyarrow."""

    suffix, sealed, ragged = ".parquet", (".parquet",), True

    def __init__(self) -> None:
        self._arrow = pyarrow("a .parquet file")

    def write(self, target: Path, rows: Rows, recipe: Recipe) -> None:
        table = self._table(rows)
        with together(target) as (made,):
            schema = table.schema.with_metadata(self._metadata(recipe, range(rows.first, rows.first + len(rows))))
            options = dict(row_group_size=max(1, len(rows))) | _OPTIONS
            self._arrow.parquet.write_table(table.cast(schema), made, **options)
            stamp(made, self.region(made))

    def join(self, target: Path, pieces: Sequence[Piece], recipe: Recipe) -> None:
        arrow, count = self._arrow, sum(stop - start for _, start, stop in pieces)
        first = self._opened(pieces[0].path).schema_arrow
        if "source" not in first.names:  # an old shard without sources
            first = first.append(arrow.field("source", arrow.string()))
        schema = first.with_metadata(self._metadata(recipe, range(count)))
        with together(target) as (made,):
            with arrow.parquet.ParquetWriter(made, schema, **_OPTIONS) as writer:
                for piece in pieces:
                    for table in self._tables(piece):
                        writer.write_table(table.cast(schema))
            stamp(made, self.region(made))

    def vectors(self, path: Path) -> Array:
        """[n, C], in memory.  Raises: InputError for a damaged file, and for rows that differ in shape."""
        content = self._opened(path)
        try:
            column = content.read(columns=["embedding"]).column(0).combine_chunks()
        except (OSError, ValueError, LookupError, self._arrow.ArrowException):
            raise _damaged(path) from None
        if not self._arrow.types.is_fixed_size_list(column.type):
            raise InputError(f"the rows of '{path}' differ in shape; give a file of kind 'embedding'")
        flat: Array = column.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(column), -1)

    def read(self, path: Path, start: int, stop: int) -> Rows:
        tables = list(self._tables(Piece(path, start, stop)))
        if not tables:
            return Rows(start, [], "float32")
        table = self._arrow.concat_tables(tables)
        column, lines = table.column("embedding").combine_chunks(), list(self.lines(path, start, stop))
        flat = column.flatten().to_numpy(zero_copy_only=False).copy()
        if self._arrow.types.is_fixed_size_list(column.type):
            return Rows(start, flat.reshape(len(lines), -1), str(flat.dtype), lines)
        sizes = np.cumsum([0, *column.value_lengths().to_pylist()])
        parts = [flat[a:b] for a, b in zip(sizes, sizes[1:], strict=False)]
        return Rows(
            start, [None if line.error else part for line, part in zip(lines, parts, strict=True)], str(flat.dtype),
            lines,
        )  # fmt: skip

    def count(self, path: Path) -> int:
        return int(self._opened(path).metadata.num_rows)

    def stated(self, path: Path) -> bytes | None:
        found: bytes | None = (self._opened(path).metadata.metadata or {}).get(KEY.encode())
        return found

    def region(self, path: Path) -> tuple[int, bytes]:
        with open(path, "rb") as stream:
            end = stream.seek(-8, os.SEEK_END)
            length = int.from_bytes(stream.read(4), "little")
            return stream.seek(max(0, end - length)), stream.read(length)

    def lines(self, path: Path, start: int = 0, stop: int | None = None) -> Iterator[Line]:
        columns = ["path", "error", "grid", "source"]
        for table in self._tables(Piece(path, start, self.count(path) if stop is None else stop), columns):
            for row in table.to_pylist():
                grid = None if row["grid"] is None else (row["grid"][0], row["grid"][1])
                yield Line(_path(row["path"]), row["error"] or "", grid, row["source"])

    # --- arrow --------------------------------------------------------------------------------------------------------

    def _metadata(self, recipe: Recipe, images: range) -> dict[str, str]:
        return {KEY: recipe.to_json(Seal.of(images, {}, self.suffix))}

    def _opened(self, path: Path) -> Any:
        try:
            found = self._arrow.parquet.ParquetFile(path)
            _ = found.schema_arrow.names, found.metadata.num_rows
        except (OSError, ValueError, self._arrow.ArrowException):
            raise _damaged(path) from None
        return found

    def _tables(self, piece: Piece, columns: list[str] | None = None) -> Iterator[Any]:
        """Yields the rows of a piece, one row group at a time."""
        content, first = self._opened(piece.path), 0
        try:
            for group in range(content.metadata.num_row_groups):
                count = content.metadata.row_group(group).num_rows
                start, stop = max(piece.start - first, 0), min(piece.stop - first, count)
                first += count
                if start < stop:
                    table = content.read_row_group(group, columns=columns).slice(start, stop - start)
                    if "source" not in table.column_names:  # an old file without sources
                        table = table.append_column("source", self._arrow.nulls(len(table), self._arrow.string()))
                    yield table
        except (OSError, ValueError, LookupError, self._arrow.ArrowException):
            raise _damaged(piece.path) from None

    def _table(self, rows: Rows) -> Any:
        arrow, vectors, lines = self._arrow, rows.vectors, rows.lines
        if isinstance(vectors, list):
            flat = [np.zeros(0, rows.dtype) if v is None else v.ravel() for v in (*vectors, None)]
            ends = np.cumsum([0, *(v.size for v in flat[:-1])], dtype=np.int64)
            column = arrow.LargeListArray.from_arrays(ends, np.concatenate(flat))
        else:  # from the flat buffer, which is ten times as fast as Python lists
            width = int(np.prod(vectors.shape[1:]))
            column = arrow.FixedSizeListArray.from_arrays(arrow.array(vectors.reshape(-1)), width)
        errors = [line.error.encode("utf-8", "backslashreplace").decode() or None for line in lines]
        return arrow.table(
            dict(
                path=arrow.array([_spelled(line.path) for line in lines], arrow.string()),
                embedding=column,
                # not of a fixed length, in which pyarrow before 24 cannot read a null
                grid=arrow.array([line.grid and list(line.grid) for line in lines], arrow.list_(arrow.int32())),
                error=arrow.array(errors, arrow.string()),
                source=arrow.array([line.source for line in lines], arrow.string()),
            )
        )


# Vectors do not compress, and a dictionary makes reading them slower.
_OPTIONS: dict[str, Any] = dict(use_dictionary=["path", "source"], compression="none")


def _damaged(path: Path) -> InputError:
    return InputError(f"'{path}' is not a complete .parquet file; remove it and run embed again")


def _spelled(path: str | None) -> str | None:
    """The path as UTF-8, which Parquet needs."""
    if path is None:
        return None
    try:
        content = os.fsencode(path)
    except UnicodeEncodeError:  # a name that no file can have
        content = path.encode("utf-8", "surrogatepass")
    with contextlib.suppress(UnicodeDecodeError):
        if b"\\x" not in content:
            return content.decode()
    return content.replace(b"\\", b"\\x5c").decode("utf-8", "backslashreplace")


def _path(spelled: str | None) -> str | None:
    """The inverse of `_spelled`."""
    if spelled is None or "\\x" not in spelled:
        return spelled
    found = re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes.fromhex(match[1].decode()), spelled.encode())
    return os.fsdecode(found)


FORMATS: dict[str, type[Format]] = {kind.suffix: kind for kind in (Npy, Safetensors, Parquet)}
