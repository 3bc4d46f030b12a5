"""Vectors on a Ray cluster: `Embedder` for a `map_batches` of one's own, `embed_dataset` for files to Parquet.

    pip install "dinov3-infer[ray]"

    ray.init()
    embed_dataset("photos/", "vectors/", "vitb16", actors=4, num_gpus=1)

Ray says nothing where actors take every CPU and the tasks that read and write wait for ever, drops the whole block of
a bad row, and appends on a second run.  So actors are counted before anything starts, a bad picture is a row with an
error, and a shard has one name.
"""

import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .backbone import Backbone
from .errors import Dinov3Error, InputError, UnsupportedError
from .features.disk.recipe import check_asked, recipe_of
from .features.disk.target import Target
from .features.disk.write import Writer
from .features.result import Pooling, pooled_width
from .features.vectors import EmbedOptions
from .images.containers import pyarrow
from .images.levels import Levels
from .images.opening import open_images
from .images.paths import identity_of
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
        errors: list[str | None] = []
        for row, found in enumerate(self._bb.iter_features(pictures, on_error="return", **self._options)):
            failed = isinstance(found, Dinov3Error)
            errors.append(str(found).encode("utf-8", "backslashreplace").decode() if failed else None)
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
    """What `Backbone.embed` writes to a folder, by the actors of a cluster; says how many shards were written.

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
    asked, run = EmbedOptions(shard_size=shard_size, **options), f"ray {uuid.uuid4().hex}"
    with target.locked(run):
        _check_continues(target, source, asked, model)
        given = dict(
            model=str(model), pictures=source, target=target, device=device, dtype=dtype, options=asked, run=run
        )
        count = -(-len(source) // shard_size)
        tasks = ray.data.from_items([{"shard": k} for k in range(count)], override_num_blocks=max(1, count))
        resources = dict(num_cpus=num_cpus) | (dict(num_gpus=num_gpus) if num_gpus else {})
        pool = ray.data.ActorPoolStrategy(size=actors)
        done = tasks.map_batches(
            _Shards, fn_constructor_kwargs=given, batch_size=1, compute=pool, **resources
        ).materialize()
        if missing := [k for k in range(count) if not target.shard(k).is_file()]:
            raise Dinov3Error(
                f"{len(missing)} of {count} shards are missing in '{out}'; call this again, which adds them"
            )
    return sum(row["written"] for row in done.take_all())


def _check_continues(target: Target, pictures: Source, asked: EmbedOptions, model: str | os.PathLike[str]) -> None:
    """Before an actor starts.  Raises: InputError where what is there does not match, as far as can be told here."""
    if (found := target.unfinished()) is None:
        return
    check_asked(pictures, asked, found.recipe, target.path)
    mine = recipe_of(Backbone.from_pretrained(model, device="cpu").extractor, pictures, asked)
    replace(mine, dtype=found.recipe.dtype).check_continues(
        found.recipe, target.path
    )  # its dtype is that of the actors


class _Shards:
    """An actor: numbers of shards in, and the number of rows in each, and whether it was written, out."""

    def __init__(
        self,
        model: str,
        pictures: Source,
        target: Target,
        options: EmbedOptions,
        device: str,
        dtype: str,
        run: str | None = None,
    ) -> None:
        bb = Backbone.from_pretrained(model, device=device, dtype=dtype)
        self._writer = Writer(target, pictures, bb.extractor, replace(options, on_error="skip", progress=False))
        self._run = run

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        rows, written = [], []
        for shard in batch["shard"]:
            before = self._stamp(int(shard))
            rows.append(self._writer.run(only=[int(shard)], run=self._run).shape[0])
            written.append(self._stamp(int(shard)) != before)
        return {"shard": batch["shard"], "rows": np.array(rows), "written": np.array(written)}

    def _stamp(self, shard: int) -> str | None:
        return identity_of(self._writer.target.shard(shard))


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise UnsupportedError("a cluster needs Ray; pip install 'dinov3-infer[ray]'") from None
    return ray
