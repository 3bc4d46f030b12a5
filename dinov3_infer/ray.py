"""Vectors on a Ray cluster: `Embedder` for a `map_batches` of one's own, `embed_dataset` for files to Parquet.

    pip install "dinov3-infer[ray]"

    ray.init()
    embed_dataset("photos/", "vectors/", "vitb16", actors=4, num_gpus=1)

Ray says nothing where actors take every CPU and the tasks that read and write wait for ever, drops the whole block of
a bad row, and appends on a second run.  So actors are counted before anything starts, a bad picture is a row with an
error, and a shard has one name.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .backbone import Backbone
from .errors import Dinov3Error, InputError, UnsupportedError
from .features.disk.target import Target
from .features.disk.write import Writer
from .features.result import Pooling, pooled_width
from .features.vectors import EmbedOptions
from .images.containers import pyarrow
from .images.levels import Levels
from .images.opening import open_images
from .images.preprocess import Fit
from .images.sources import Source

__all__ = ["Embedder", "check_cluster", "embed_dataset"]


class Embedder:
    """A class for `Dataset.map_batches`: rows with a picture in, rows with its vector and what was wrong out.

        ds.map_batches(Embedder, fn_constructor_kwargs=dict(model="vitb16"), batch_size=64, num_gpus=1,
                       compute=ray.data.ActorPoolStrategy(size=4))

    A batch holds "bytes" (as `read_binary_files` gives them), "image" (arrays [H, W, 3]), or "path" alone.  All other
    columns stay; the picture goes, and "embedding" (a plain fixed-size list of float32), "grid" and "error" come.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        device: str = "auto",
        dtype: str = "auto",
        size: int | tuple[int, int] | None = None,
        fit: Fit | None = None,
        levels: Levels | None = None,
        pooling: Pooling = "cls",
        normalize: bool = False,
        batch_size: int = 32,
    ) -> None:
        self._arrow = pyarrow("Ray Data")
        self._bb = Backbone.from_pretrained(model, device=device, dtype=dtype)
        self._options: dict[str, Any] = dict(size=size, fit=fit, levels=levels, pooling=pooling, batch_size=batch_size)
        self._normalize = normalize
        self._width = pooled_width(self._bb.embed_dim, pooling)

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        """A pyarrow table."""
        arrow = self._arrow
        name = next((column for column in ("bytes", "image", "path") if column in batch), None)
        if name is None:
            raise InputError(f"a batch holds 'bytes', 'image' or 'path'; this one has {', '.join(batch)}")
        pictures = [p.tobytes() if isinstance(p, np.void) else str(p) if name == "path" else p for p in batch[name]]
        vectors = np.full((len(pictures), self._width), np.nan, np.float32)
        grids: list[list[int] | None] = []
        errors: list[str] = []
        for row, found in enumerate(self._bb.iter_features(pictures, on_error="return", **self._options)):
            failed = isinstance(found, Dinov3Error)
            errors.append(str(found).encode("utf-8", "backslashreplace").decode() if failed else "")
            grids.append(None if isinstance(found, Dinov3Error) else list(found.grid))
            if not isinstance(found, Dinov3Error):
                vectors[row] = (found.normalize() if self._normalize else found).embedding[0].numpy()
        kept = {
            column: arrow.array(list(values)) for column, values in batch.items() if column not in ("bytes", "image")
        }
        return arrow.table(
            kept
            | dict(
                embedding=arrow.FixedSizeListArray.from_arrays(arrow.array(vectors.reshape(-1)), self._width),
                grid=arrow.array(grids, arrow.list_(arrow.int32(), 2)),
                error=arrow.array(errors, arrow.string()),
            )
        )


def check_cluster(actors: int, num_cpus: float, num_gpus: float, total: Mapping[str, float]) -> None:
    """Raises InputError where the actors would leave no CPU for the tasks that read and write: Ray waits in silence."""
    have, wanted = total.get("CPU", 0.0), actors * num_cpus
    if wanted > have - 1:
        raise InputError(
            f"{actors} actors of {num_cpus:g} CPUs take {wanted:g} of the cluster's {have:g}, and reading and writing "
            f"need one of their own; give fewer actors or num_cpus={max(0.0, (have - 1) / actors):.2g}"
        )
    if actors * num_gpus > total.get("GPU", 0.0):
        raise InputError(
            f"{actors} actors of {num_gpus:g} GPUs need {actors * num_gpus:g}, and the cluster has "
            f"{total.get('GPU', 0.0):g}; give fewer"
        )


def embed_dataset(
    pictures: str | os.PathLike[str] | Sequence[str] | Source,
    out: str | os.PathLike[str],
    model: str | os.PathLike[str],
    *,
    actors: int = 1,
    num_cpus: float = 0.5,
    num_gpus: float = 0.0,
    shard_size: int = 1000,
    device: str = "auto",
    dtype: str = "auto",
    **options: Any,
) -> int:
    """What `Backbone.embed` writes to a folder, by the actors of a cluster; says how many shards are new.

    Each shard is one task, read, computed and written by one actor, so pixels do not travel; the folder is the same as
    that of `embed`, which can go on with it, and the other way round.

    `pictures`: as in `embed`, at paths that every machine of the cluster can read.
    `out`: a folder that every machine can write to; its suffix says the format (see `embed`).
    `actors`: processes that hold the model, each with `num_cpus` and `num_gpus`.
    `options`: of `embed` that say how vectors are made; a picture that cannot be read is a row of NaN.

    Raises: InputError where the actors would take the whole cluster, or what is at `out` does not match; Dinov3Error
    where shards are missing in the end.
    """
    ray = _ray()
    if not ray.is_initialized():
        raise InputError("no Ray cluster is connected; call ray.init() first, which decides where this runs")
    check_cluster(actors, num_cpus, num_gpus, ray.cluster_resources())
    path = Path(out).expanduser().absolute()
    target = Target.find(f"{path}{os.sep}")
    source = open_images(pictures)
    if not isinstance(source, Source):
        raise InputError("a stream cannot be shared by several machines; give a folder, list file, archive or paths")
    count = -(-len(source) // shard_size)
    todo = [k for k in range(count) if not target.shard(k).is_file()]
    if not todo:
        return 0
    given = dict(
        model=str(model), pictures=source, target=target, device=device, dtype=dtype,
        options=EmbedOptions(shard_size=shard_size, **options),
    )  # fmt: skip
    tasks = ray.data.from_items([{"shard": k} for k in todo], override_num_blocks=len(todo))
    resources = dict(num_cpus=num_cpus) | (dict(num_gpus=num_gpus) if num_gpus else {})
    tasks.map_batches(
        _Shards, fn_constructor_kwargs=given, batch_size=1, compute=ray.data.ActorPoolStrategy(size=actors), **resources
    ).materialize()
    if missing := [k for k in todo if not target.shard(k).is_file()]:
        raise Dinov3Error(f"{len(missing)} of {count} shards are missing in '{out}'; call this again, which adds them")
    return len(todo)


class _Shards:
    """An actor: numbers of shards in, and the number of rows in each out."""

    def __init__(
        self, model: str, pictures: Source, target: Target, options: EmbedOptions, device: str, dtype: str
    ) -> None:
        bb = Backbone.from_pretrained(model, device=device, dtype=dtype)
        self._writer = Writer(target, pictures, bb.extractor, replace(options, on_error="skip", progress=False))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        rows = [self._writer.run(only=[int(shard)]).shape[0] for shard in batch["shard"]]
        return {"shard": batch["shard"], "rows": np.array(rows)}


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise UnsupportedError("a cluster needs Ray; pip install 'dinov3-infer[ray]'") from None
    return ray
