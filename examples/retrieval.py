"""Finds the images of a folder that are most similar to given images, and draws a contact sheet.

    python examples/retrieval.py QUERY.jpg [QUERY2.jpg ...] FOLDER --out sheet.jpg --count 5

Each row shows a query, then the most similar images with their cosines.
"""

from collections.abc import Sequence

import torch
from common import load, log, parser, run, save
from PIL import Image, ImageOps
from torch import Tensor

from dinov3_infer import Backbone, ImageLike, list_images
from dinov3_infer.tasks import nearest, panel, sheet

SIDE = 224  # pixels of an image on the sheet


def embed(bb: Backbone, images: Sequence[ImageLike], size: int) -> Tensor:
    """One vector of length 1 per image, [N, C]."""
    return torch.from_numpy(bb.embed(list(images), size=size - size % bb.patch_size, normalize=True))


def contact_sheet(rows: Sequence[Sequence[ImageLike]], cosines: Tensor) -> Image.Image:
    """A row per query with the images found for it; their cosines [rows, count] are the captions."""
    shown = [ImageOps.fit(panel(image), (SIDE, SIDE)) for row in rows for image in row]
    captions = [text for row in cosines.tolist() for text in ("query", *(f"{cosine:.2f}" for cosine in row))]
    return sheet(shown, captions, columns=len(rows[0]))


def main() -> None:
    options = parser(__doc__, "sheet.jpg", size=224)
    options.add_argument("queries", nargs="+", metavar="QUERY")
    options.add_argument("folder", help="folder, or pattern such as 'photos/**/*.jpg'")
    options.add_argument("--count", type=int, default=5, help="number of images per query (default: %(default)s)")
    args = options.parse_args()
    gallery = list_images(args.folder)
    bb = load(args)
    log.info("embedding the %d images of %s", len(gallery), args.folder)
    bank = embed(bb, gallery, args.size)
    cosines, found = nearest(embed(bb, args.queries, args.size), bank, min(args.count, len(gallery)))
    rows = [[query, *(gallery[i] for i in row)] for query, row in zip(args.queries, found.tolist(), strict=True)]
    for row, values in zip(rows, cosines.tolist(), strict=True):
        print(row[0], *(f"{cosine:.3f} {name}" for name, cosine in zip(row[1:], values, strict=True)), sep="\n  ")
    save(contact_sheet(rows, cosines), args.out)


if __name__ == "__main__":
    run(main)
