"""Features and a PCA picture of one photograph.

    python examples/quickstart.py [PICTURE] [MODEL] [OUT.png]

MODEL is a name ("vitb16"), a hub id, a directory or a weights file.  Without one it is nano, which lies in the package:
small, and weak beside the models that it is a stand-in for.
"""

import sys
from pathlib import Path

from dinov3_infer import Backbone
from dinov3_infer.tasks import pca_picture, pca_rgb


def main() -> None:
    given = dict(enumerate(sys.argv[1:]))
    picture = given.get(0, str(Path(__file__).parent / "cat.jpg"))
    out = given.get(2, "pca.png")
    backbone = Backbone.from_pretrained(given.get(1) or "nano")

    features = backbone.extract_features(picture, fit="native", size=768)
    height, width = features.original_sizes[0]
    seen = f"{features.input_size[1]} x {features.input_size[0]}"
    print(f"picture      {picture}, {width} x {height} pixels, seen as {seen}")
    print(f"embedding    {list(features.embedding.shape)}  one vector for the picture")
    print(f"feature_map  {list(features.feature_map.shape)}  one vector per patch of {backbone.patch_size} pixels")
    pca_picture(picture, pca_rgb(features)[0]).save(out)
    print(f"wrote        {out}: the picture, and its patches coloured by their first three principal components")


if __name__ == "__main__":
    main()
