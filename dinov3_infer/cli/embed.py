"""`dinov3-infer embed`: one vector per picture."""

import argparse
import math
import os

from ..features.disk.target import Target
from ..images.opening import open_source
from ..images.paths import address_scheme, read_list
from ..images.sources import Files, Source, joined, picture_suffixes
from .common import geometry, load_backbone, status
from .main import OK, tell

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    target = Target.find(args.out, args.overwrite)  # before a model is loaded
    pictures = _sources(args.sources)
    report = load_backbone(args).embed(
        pictures, args.out, **geometry(args), kind=args.kind, pooling=args.pooling, normalize=args.normalize,
        out_dtype=args.out_dtype, decode=args.decode, batch_size=args.batch_size, shard_size=args.shard_size,
        num_workers=args.workers, on_error=args.on_error, overwrite=args.overwrite,
    )  # fmt: skip
    count, skipped = report.shape[0], len(report.failures)
    numbers = f" of {math.prod(report.shape[1:])} numbers" if len(report.shape) > 1 else ""
    resumed = f", of which {report.resumed} were there" if report.resumed else ""
    lists = target.path if target.is_folder or not target.format.sides else target.path.with_suffix(".jsonl")
    left_out = (
        f"; {skipped} could not be read, {'its row is' if skipped == 1 else 'their rows are'} NaN, see '{lists}'"
        if skipped
        else ""
    )
    tell(f"wrote '{target.path}': {count} {'vector' if count == 1 else 'vectors'}{numbers}{resumed}{left_out}")
    if "WORLD_SIZE" in os.environ:  # torchrun ends all processes where one does not return 0
        return OK
    return status(count, skipped)


def _sources(given: list[str]) -> Source:
    """All pictures that are meant, in the order given."""
    found: list[Source] = []
    single: list[str] = []  # neighbours that are one picture each: a pattern that the shell has resolved

    def end() -> None:
        if single:
            found.append(Files("pictures", single))
            single.clear()

    for text in given:
        is_list = text.startswith("@")
        source = Files(text, read_list(text[1:])) if is_list else open_source(text)
        is_single = not is_list and (address_scheme(text) or text.lower().endswith(tuple(picture_suffixes())))
        if is_single and isinstance(source, Files) and len(source) == 1:
            single.append(text)
            continue
        end()
        found.append(source)
    end()
    return joined(found)
