"""`dinov3-infer explore`: writes a web page that shows the patches similar to a chosen one."""

import argparse
import os

from ..errors import InputError
from ..images.opening import find_images
from ..tasks.explore import explore
from .inputs import check_file, geometry, load_backbone
from .main import OK, tell

__all__ = ["run"]

MOST = 64  # images on a page: about 100 MB, and a tenth of a second per chosen patch


def run(args: argparse.Namespace) -> int:
    """Writes the page; returns the exit status.  Raises: InputError for more than 64 images."""
    images = find_images(args.sources)
    if len(images) > MOST:
        raise InputError(f"{len(images)} images do not fit on one page; give at most {MOST}")
    out = check_file(args.out, args.overwrite, (".html", ".htm"))
    given = [images.image(i) for i in range(len(images))]
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
