"""`dinov3-infer embed`: writes one embedding per image."""

import argparse
import math
import os
from dataclasses import fields

from ..features.disk.target import Target
from ..features.vectors import EmbedOptions
from ..images.opening import find_images
from .inputs import geometry, load_backbone, status
from .main import OK, tell

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Embeds images; returns the exit status."""
    target = Target.find(args.out, args.overwrite)  # checked before the model is loaded
    images = find_images(args.sources)
    given = vars(args) | geometry(args) | {"progress": False if args.quiet else None}
    options = {field.name: given[field.name] for field in fields(EmbedOptions) if field.name in given}
    report = load_backbone(args).embed(images, args.out, **options)
    count, skipped = report.shape[0], len(report.failures)
    numbers = f" of {math.prod(report.shape[1:])} numbers" if len(report.shape) > 1 else ""
    resumed = f", of which {report.resumed} were already there" if report.resumed else ""
    resumed += f"; {report.changed} computed again, because the image changed" if report.changed else ""
    resumed += f"; {report.retried} tried again, because they had failed before" if report.retried else ""
    lists = target.path if target.is_folder or not target.format.sides else target.path.with_suffix(".jsonl")
    left_out = (
        f"; {skipped} could not be read ({'its row is' if skipped == 1 else 'their rows are'} NaN), see '{lists}'"
        if skipped
        else ""
    )
    tell(f"wrote '{target.path}': {count} {'vector' if count == 1 else 'vectors'}{numbers}{resumed}{left_out}")
    if "WORLD_SIZE" in os.environ:  # torchrun ends all processes if one does not return 0
        return OK
    return status(count, skipped)
