"""Where a picture differs from all good ones: the distance of each patch to a memory bank.

    python examples/anomaly.py GOOD_FOLDER PICTURE.jpg [PICTURE2.jpg ...] --out anomaly.jpg

The bank holds the patches of the good pictures.  A patch is as odd as one minus the cosine of its nearest in the bank,
a picture as odd as the mean of its oddest hundredth.  Colours end at twice what is odd in good pictures, each compared
with the others.

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
    """Patches of good pictures, at length 1."""

    def __init__(self, good: Sequence[Features]) -> None:
        if len(good) < 2:
            raise InputError(f"a memory bank needs at least 2 good pictures, got {len(good)}; give more")
        self.each = [F.normalize(f.patch_tokens[0], dim=-1) for f in good]
        self.bank = torch.cat(self.each)

    def distances(self, features: Features) -> Tensor:
        """How odd each patch of a picture is, [h, w] in 0..2."""
        return self._to(F.normalize(features.patch_tokens[0], dim=-1), self.bank).view(features.grid)

    def limit(self) -> float:
        """How odd good patches are at most, each picture compared with the others."""
        others = [torch.cat(self.each[:i] + self.each[i + 1 :]) for i in range(len(self.each))]
        return max(float(self._to(own, bank).quantile(0.99)) for own, bank in zip(self.each, others, strict=True))

    @staticmethod
    def _to(tokens: Tensor, bank: Tensor) -> Tensor:
        return 1 - nearest(tokens, bank, 1)[0][:, 0]


def score(distances: Tensor) -> float:
    """How odd a picture is: the mean of its oddest hundredth of patches."""
    return float(distances.flatten().topk(max(1, distances.numel() // 100)).values.mean())


def main() -> None:
    options = parser(__doc__, "anomaly.jpg", "good", size=448, layer=True)
    options.add_argument("pictures", nargs="+", metavar="PICTURE")
    args = options.parse_args()
    bb = load(args)
    good, asked = (
        list(layer_features(bb, pictures, args.layer, args.size))
        for pictures in (list_images(args.good), args.pictures)
    )
    bank = MemoryBank(good)
    shown, captions, limit = [], [], bank.limit()
    for name, features in zip(args.pictures, asked, strict=True):
        distances = bank.distances(features)
        shown += [panel(name), overlay(name, distances, limits=(0, 2 * limit))]
        odd = score(distances)
        captions += [Path(name).name, f"score {odd:.3f}, {odd / limit:.1f} times the limit of good images"]
        print(f"{name}: {score(distances):.3f}, good ones up to {limit:.3f}")
    save(sheet(shown, captions, columns=2), args.out)


if __name__ == "__main__":
    run(main)
