"""`dinov3-infer embed`: one vector per picture."""

import argparse
import os
from pathlib import Path

from ..backbone import Backbone
from ..embed import EmbedReport
from .common import geometry, load_backbone, status
from .main import tell
from .sources import check_file, find_pictures, whole

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    pictures = [picture.path for picture in find_pictures(args.sources)]
    out = check_file(args.out, args.overwrite, (".npy",))
    listing = check_file(str(out.with_suffix(".jsonl")), args.overwrite, (".jsonl",))
    report = _write(load_backbone(args), pictures, out, listing, args)
    skipped = len(report.failures)
    left_out = f"; {skipped} could not be read, their rows are NaN, see '{listing}'" if skipped else ""
    tell(f"wrote '{out}': {report.shape[0]} vectors of {report.shape[1]} numbers{left_out}")
    return status(len(pictures), skipped)


def _write(bb: Backbone, pictures: list[str], out: Path, listing: Path, args: argparse.Namespace) -> EmbedReport:
    """Both files under other names first, so that what is there is replaced by something whole or not at all."""
    with whole(out) as beside:
        report = bb.embed(
            pictures, beside, **geometry(args), pooling=args.pooling, normalize=args.normalize,
            batch_size=args.batch_size, num_workers=args.workers, on_error=args.on_error,
        )  # fmt: skip
        os.replace(beside.with_suffix(".jsonl"), listing)
    return report
