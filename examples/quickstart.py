"""Features of one image, and its patches in colours.

    python examples/quickstart.py [IMAGE] [MODEL] [OUT.png]

Without MODEL it uses nano, which is part of the package: it is small, and far weaker than the released models.
"""

import argparse
import sys
from pathlib import Path

from dinov3_infer import Backbone, Dinov3Error
from dinov3_infer.tasks import pca_picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cat = str(Path(__file__).parent / "cat.jpg")
    parser.add_argument("image", nargs="?", default=cat, metavar="IMAGE", help="path or web address (default: cat.jpg)")
    parser.add_argument(
        "model", nargs="?", default="nano", metavar="MODEL", help="name, hub id, folder or weights file (default: nano)"
    )
    parser.add_argument("out", nargs="?", default="pca.png", metavar="OUT.png", help="file to write (default: pca.png)")
    args = parser.parse_args()

    backbone = Backbone.from_pretrained(args.model or "nano")
    features = backbone.extract_features(args.image, fit="native", size=768)
    height, width = features.original_sizes[0]
    seen = f"{features.input_size[1]} x {features.input_size[0]}"
    print(f"image        {args.image}, {width} x {height} pixels, seen as {seen}")
    print(f"embedding    {list(features.embedding.shape)}  one vector for the image")
    print(f"feature_map  {list(features.feature_map.shape)}  one vector per patch of {backbone.patch_size} pixels")
    pca_picture(args.image, features).save(args.out)
    print(f"wrote        {args.out}: the image, and its patches coloured by their first three principal components")


if __name__ == "__main__":
    try:
        main()
    except (Dinov3Error, OSError, ValueError) as error:  # Pillow raises ValueError for an unknown suffix
        sys.exit(f"quickstart.py: {error}")
