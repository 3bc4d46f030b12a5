"""`embed`: one row for each image, in an array or on disk."""

import os
from collections.abc import Iterable, Sized
from typing import Any

import numpy as np

from ..images.decode import ImageLike
from ..images.opening import open_images
from ..images.sources import Numbered, Source
from .disk.target import Target
from .disk.write import Writer
from .extractor import Extractor
from .stream import items_of
from .vectors import EmbedOptions, EmbedReport, collect, vectors_of

__all__ = ["embed"]


def embed(
    extractor: Extractor,
    images: ImageLike | Iterable[ImageLike] | Source | Numbered,
    out: str | os.PathLike[str] | None,
    options: EmbedOptions,
) -> np.ndarray[Any, Any] | EmbedReport:
    """What `Backbone.embed` describes."""
    target = None if out is None else Target.find(out, options.overwrite)
    opened = open_images(images)
    if target is not None:
        return Writer(target, opened, extractor, options).run()
    batcher = extractor.batcher(
        extractor.preprocess.with_options(options.size, options.fit),
        lambda batches: vectors_of(extractor, batches, options),
        options.batch_size or 32,
        num_workers=options.num_workers,
        decode=options.decode,
    )
    width = extractor.network.embed_dim * (2 if options.pooling == "cls_mean" else 1)
    total = len(opened) if isinstance(opened, Sized) else None
    return collect(batcher(items_of(opened)), options, width, total)
