"""Shows where an image differs from good images, by the distance of each patch to a memory bank.

    python examples/anomaly.py GOOD_FOLDER IMAGE.jpg [IMAGE2.jpg ...] --out anomaly.jpg

The bank holds the patches of the good images.  The distance of a patch is one minus the cosine of the nearest patch in
the bank; the score of an image is the mean over its 1 % most distant patches.  The colour scale ends at twice the
largest distance of good images, each compared with the others.

Source: AnomalyDINO (arXiv 2405.14529), section 3.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from common import layer_features, load, parser, run, save
from torch import Tensor

from dinov3_infer import Features, InputError, list_images
from dinov3_infer.tasks import nearest, overlay, panel, sheet


class MemoryBank:
    """Patches of good images, scaled to length 1.

    Raises: InputError for fewer than 2 images.
    """

    def __init__(self, good: Sequence[Features]) -> None:
        if len(good) < 2:
            raise InputError(f"a memory bank needs at least 2 good images, got {len(good)}; give more")
        self.each = [F.normalize(f.patch_tokens[0], dim=-1) for f in good]
        self.bank = torch.cat(self.each)

    def distances(self, features: Features) -> Tensor:
        """The distance of each patch of an image to the bank, [h, w] in 0..2."""
        return self._to(F.normalize(features.patch_tokens[0], dim=-1), self.bank).view(features.grid)

    def limit(self) -> float:
        """The 99th percentile of the distances of a good image to the other good images; the largest of all."""
        others = [torch.cat(self.each[:i] + self.each[i + 1 :]) for i in range(len(self.each))]
        return max(float(self._to(own, bank).quantile(0.99)) for own, bank in zip(self.each, others, strict=True))

    @staticmethod
    def _to(tokens: Tensor, bank: Tensor) -> Tensor:
        return 1 - nearest(tokens, bank, 1)[0][:, 0]


def score(distances: Tensor) -> float:
    """The score of an image, from the distances [h, w]: the mean of the largest 1 %."""
    return float(distances.flatten().topk(max(1, distances.numel() // 100)).values.mean())


def main() -> None:
    options = parser(__doc__, "anomaly.jpg", "good", size=448, layer=True)
    options.add_argument("images", nargs="+", metavar="IMAGE")
    args = options.parse_args()
    bb = load(args)
    good, asked = (
        list(layer_features(bb, images, args.layer, args.size)) for images in (list_images(args.good), args.images)
    )
    bank = MemoryBank(good)
    shown, captions, limit = [], [], bank.limit()
    for name, features in zip(args.images, asked, strict=True):
        distances = bank.distances(features)
        shown += [panel(name), overlay(name, distances, limits=(0, 2 * limit))]
        found = score(distances)
        captions += [Path(name).name, f"score {found:.3f}, {found / limit:.1f} times the limit of good images"]
        print(f"{name}: {found:.3f}, good images up to {limit:.3f}")
    save(sheet(shown, captions, columns=2), args.out)


if __name__ == "__main__":
    run(main)
