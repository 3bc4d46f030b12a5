"""Outputs of `embed` for tests: writing, checking, and rewriting them in the first format."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from pictures import photo
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dinov3_infer import Backbone
from dinov3_infer.features.disk.store import Store

OPTIONS: dict[str, Any] = dict(size=32, shard_size=4, batch_size=2, on_error="skip")
OUTS = ["x/", "x.npy", "x.safetensors", "x.parquet", "x.parquet/"]
COUNT = 10


def fill(folder: Path, seed: int = 0, count: int = COUNT) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.fromarray(photo(40, 30 + i, seed=seed + i)).save(folder / f"{i}.png")
    return folder


def rows(out: str | Path) -> np.ndarray:
    """All vectors of an output, scaled to length 1, after a check of every file."""
    return np.concatenate([block for _, block in Store(out, verify=True).blocks()])


def plain(bb: Backbone, images: Any) -> np.ndarray:
    return bb.embed(images, size=32, normalize=True, on_error="skip")


def files(out: str) -> list[Path]:
    path = Path(out)
    return sorted(path.iterdir()) if path.is_dir() else sorted(path.parent.glob(f"{path.stem}.*"))


def age(out: str) -> None:
    """Rewrites an output in the first format: records without checksums, lists without sources."""

    def record(text: str) -> str:
        found = json.loads(text)
        return json.dumps(
            {k: v for k, v in found.items() if k not in ("first", "rows", "files", "own")} | {"format": 1}
        )

    for path in files(out):
        shard = path.stem.isdigit()
        if path.suffix == ".json" and shard:
            path.unlink()
        elif path.suffix == ".json":
            path.write_text(record(path.read_text()))
        elif path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            for line in lines:
                del line["source"]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        elif path.suffix == ".safetensors":
            with safe_open(path, "np") as opened:
                text = opened.metadata()["dinov3_infer"]
            save_file(load_file(path), path, {"dinov3_infer": record(text)})
        elif path.suffix == ".parquet":
            import pyarrow.parquet as arrow

            found = arrow.read_table(path).drop(["source"])
            text = record(found.schema.metadata[b"dinov3_infer"].decode())
            arrow.write_table(found.replace_schema_metadata({"dinov3_infer": text}), path)


class Stop(BaseException):
    """Acts like a kill: no code catches it or writes after it."""
