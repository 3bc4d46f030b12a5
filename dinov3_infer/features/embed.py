"""`embed`: one row per image, in an array or on disk."""

import os
from collections.abc import Iterable, Sized
from typing import Any

import numpy as np

from ..images.decode import ImageLike
from ..images.opening import open_images
from ..images.sources import Numbered, Source
from .extractor import Extractor
from .result import EmbedReport, pooled_width
from .stream import items_of
from .vectors import EmbedOptions, collect, vectors_of

__all__ = ["embed"]


def embed(
    extractor: Extractor,
    images: ImageLike | Iterable[ImageLike] | Source | Numbered,
    out: str | os.PathLike[str] | None,
    options: EmbedOptions,
) -> np.ndarray[Any, Any] | EmbedReport:
    """See `Backbone.embed`: an array [N, C], [N, P, C] or [N, C, h, w], or with `out` a report.

    Raises: as `Backbone.embed`.
    """
    if out is not None:
        from .disk.target import Target  # imported here, because few processes write vectors
        from .disk.write import Writer

        target = Target.find(out, options.overwrite)
        return Writer(target, open_images(images), extractor, options).run()
    opened = open_images(images)
    transform = extractor.transform(options.size, options.fit, options.levels)
    extractor.warm(transform)
    batcher = extractor.batcher(
        transform,
        lambda batches: vectors_of(extractor, batches, options),
        options.batch_size or 32,
        num_workers=options.num_workers,
        decode=options.decode,
    )
    width = pooled_width(extractor.network.embed_dim, options.pooling)
    total = len(opened) if isinstance(opened, Sized) else None
    return collect(batcher(items_of(opened)), options, width, total)
