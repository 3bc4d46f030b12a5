"""Seven images as bytes, and archives of them."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import photo
from PIL import Image

from dinov3_infer import load_image
from dinov3_infer.images.sources import Source


def png(seed: int, size: tuple[int, int] = (20, 30)) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(photo(*size, seed=seed)).save(stream, "PNG")
    return stream.getvalue()


CONTENT = [png(i) for i in range(7)]


def same(source: Source, contents: list[bytes]) -> bool:
    found = [source.load(i).image for i in range(len(source))]
    return len(found) == len(contents) and all(map(torch.equal, found, map(load_image, contents)))  # type: ignore[arg-type]


def write_tar(path: Path, contents: list[bytes] = CONTENT) -> Path:
    with tarfile.open(path, "w") as archive:
        for i, content in enumerate(contents):
            info = tarfile.TarInfo(f"in/{i}.png")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_table(path: Path, column: str = "image", bare: bool = False, contents: Any = CONTENT) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = contents if bare else [{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(contents)]
    pyarrow.parquet.write_table(pa.table({"label": [0] * len(rows), column: rows}), path, row_group_size=3)
    return path
