"""`dinov3-infer explore`: a page on which one chooses a patch and sees what is similar to it."""

import argparse
import os

from ..errors import InputError
from ..images.opening import find_images
from ..tasks.explore import explore
from .inputs import check_file, geometry, load_backbone
from .main import OK, tell

__all__ = ["run"]

MOST = 64  # images on one page: about 100 MB, and a tenth of a second for each patch


def run(args: argparse.Namespace) -> int:
    images = find_images(args.sources)
    if len(images) > MOST:
        raise InputError(f"{len(images)} images do not fit on one page; give {MOST} at most")
    out = check_file(args.out, args.overwrite, (".html", ".htm"))
    given = [images.picture(i) for i in range(len(images))]
    keys = [str(images.key(i) or images.label(i)) for i in range(len(images))]
    short = [os.path.basename(key) for key in keys]
    names = short if len(set(short)) == len(keys) else keys
    size = geometry(args)["size"]
    found = explore(load_backbone(args), given, out, names=names, size=size, fit=args.fit)
    tell(
        f"wrote '{out}': {found.patches:,} patches; the largest error of a cosine over {found.pairs:,} pairs is "
        f"{found.error:.4f}"
    )
    return OK
