"""Vectors on a Ray cluster: `Embedder` for your own `map_batches`, `embed_dataset` to write files.

    pip install "dinov3-infer[ray]"

    ray.init()
    embed_dataset("photos/", "vectors/", "vitb16", actors=4, num_gpus=1)

Ray waits without a message if actors take every CPU and none is left for the tasks that read and write; it drops the
whole block of a bad row, and appends when a job runs twice.  So actors are counted before anything starts, an image
that cannot be read becomes a row with an error, and each shard has a fixed name.
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
    """A class for `Dataset.map_batches`: takes rows with an image and returns rows with its vector and error.

    A batch holds a column "bytes" (as from `read_binary_files`), "image" (arrays [H, W, 3]) or "path".  The columns
    "bytes" and "image" are removed, other columns stay, and "embedding" (a fixed-size list of float32), "grid" and
    "error" are added.

    Args:
        model: as in `Backbone.from_pretrained`.
        device: as in `Backbone.from_pretrained` (default: "auto").
        dtype: as in `Backbone.from_pretrained` (default: "auto").
        size: as in `Backbone.extract_features`.
        fit: as in `Backbone.extract_features`.
        levels: as in `Backbone.extract_features`.
        pooling: as in `Backbone.extract_features` (default: "cls").
        normalize: scale each vector to length 1 (default: False).
        batch_size: images per pass (default: 32).

    Raises:
        UnsupportedError: pyarrow is not installed.  Other errors are those of `Backbone.from_pretrained`.

    Example:
        >>> ds.map_batches(Embedder, fn_constructor_kwargs=dict(model="vitb16"), batch_size=64, num_gpus=1,
        ...                compute=ray.data.ActorPoolStrategy(size=4))
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
        """The rows of a batch with their vectors, [C] or [2C] (pooling "cls_mean"), as a pyarrow table.

        Raises: InputError for a batch without images.
        """
        arrow = self._arrow
        name = next((column for column in ("bytes", "image", "path") if column in batch), None)
        if name is None:
            raise InputError(
                f"a batch needs a column 'bytes', 'image' or 'path', got {', '.join(batch)}; add or rename one"
            )
        images = [p.tobytes() if isinstance(p, np.void) else str(p) if name == "path" else p for p in batch[name]]
        vectors = np.full((len(images), self._width), np.nan, np.float32)
        grids: list[list[int] | None] = []
        errors: list[str | None] = []
        for row, found in enumerate(self._bb.iter_features(images, on_error="return", **self._options)):
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
    """Checks that the actors leave a CPU for reading and writing; Ray would wait without a message.

    Raises: InputError if they do not.
    """
    have, wanted = total.get("CPU", 0.0), actors * num_cpus
    if wanted > have - 1:
        raise InputError(
            f"{actors} actors with {num_cpus:g} CPUs each take {wanted:g} of the cluster's {have:g} CPUs, and one must "
            f"stay free for reading and writing; give fewer actors or num_cpus={max(0.0, (have - 1) / actors):.2g}"
        )
    if actors * num_gpus > total.get("GPU", 0.0):
        raise InputError(
            f"{actors} actors with {num_gpus:g} GPUs each need {actors * num_gpus:g} GPUs, and the cluster has "
            f"{total.get('GPU', 0.0):g}; give fewer actors or a smaller num_gpus"
        )


def embed_dataset(
    images: str | os.PathLike[str] | Sequence[str] | Source,
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
    """Writes what `Backbone.embed` writes to a folder, computed by the actors of a Ray cluster.

    Each shard is one task: one actor reads, computes and writes it, so pixels are not sent between machines.  The
    folder is the same as that of `Backbone.embed`, and each of the two can continue the other.

    Args:
        images: as in `Backbone.embed`, at paths that every machine of the cluster can read.
        out: a folder that every machine can write to; its suffix decides the format.
        model: as in `Backbone.from_pretrained`.
        actors: number of processes that hold the model (default: 1).
        num_cpus: CPUs per actor (default: 0.5).
        num_gpus: GPUs per actor (default: 0).
        shard_size: images per shard (default: 1000).
        device: as in `Backbone.from_pretrained` (default: "auto").
        dtype: as in `Backbone.from_pretrained` (default: "auto").
        options: options of `Backbone.embed` that change the vectors; an image that cannot be read becomes a row of NaN.

    Returns:
        The number of shards that this call wrote.

    Raises:
        UnsupportedError: Ray is not installed.
        InputError: Ray is not initialised, the actors would take the whole cluster, or `out` holds other vectors.
        Dinov3Error: shards are missing at the end.

    Example:
        >>> ray.init()
        >>> embed_dataset("photos/", "vectors/", "vitb16", actors=4, num_gpus=1)
    """
    ray = _ray()
    if not ray.is_initialized():
        raise InputError("no Ray cluster is connected; call ray.init() first")
    check_cluster(actors, num_cpus, num_gpus, ray.cluster_resources())
    path = Path(out).expanduser().absolute()
    target = Target.find(f"{path}{os.sep}")
    source = open_images(images)
    if not isinstance(source, Source):
        raise InputError("several machines cannot share a stream; give a folder, list file, archive or paths")
    asked, run = EmbedOptions(shard_size=shard_size, **options), f"ray {uuid.uuid4().hex}"
    with target.locked(run):
        _check_continues(target, source, asked, model)
        given = dict(model=str(model), images=source, target=target, device=device, dtype=dtype, options=asked, run=run)
        count = -(-len(source) // shard_size)
        tasks = ray.data.from_items([{"shard": k} for k in range(count)], override_num_blocks=max(1, count))
        resources = dict(num_cpus=num_cpus) | (dict(num_gpus=num_gpus) if num_gpus else {})
        pool = ray.data.ActorPoolStrategy(size=actors)
        done = tasks.map_batches(
            _Shards, fn_constructor_kwargs=given, batch_size=1, compute=pool, **resources
        ).materialize()
        if missing := [k for k in range(count) if not target.shard(k).is_file()]:
            raise Dinov3Error(
                f"{len(missing)} of {count} shards are missing in '{out}'; repeat the call, which adds them"
            )
    return sum(row["written"] for row in done.take_all())


def _check_continues(target: Target, images: Source, asked: EmbedOptions, model: str | os.PathLike[str]) -> None:
    """Checks the vectors on disk before an actor starts.  Raises: InputError for another recipe."""
    if (found := target.unfinished()) is None:
        return
    check_asked(images, asked, found.recipe, target.path)
    mine = recipe_of(Backbone.from_pretrained(model, device="cpu").extractor, images, asked)
    replace(mine, dtype=found.recipe.dtype).check_continues(found.recipe, target.path)  # only the actors know the dtype


class _Shards:
    """An actor: takes shard numbers, writes the shards, and returns their numbers of rows and whether they are new."""

    def __init__(
        self,
        model: str,
        images: Source,
        target: Target,
        options: EmbedOptions,
        device: str,
        dtype: str,
        run: str | None = None,
    ) -> None:
        bb = Backbone.from_pretrained(model, device=device, dtype=dtype)
        self._writer = Writer(target, images, bb.extractor, replace(options, on_error="skip", progress=False))
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
        raise UnsupportedError("embed_dataset needs Ray; pip install 'dinov3-infer[ray]'") from None
    return ray
