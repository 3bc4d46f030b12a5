"""Classifies a video by an attentive probe over the patches of its frames, trained on a folder per class.

    python examples/video.py VIDEOS CLIP --out video.jpg          # VIDEOS/<class>/<video, GIF or folder of frames>

The backbone computes the features of each frame by itself, once.  The probe attends to the patches of all frames
together, averaged in cells.  A code of the time is added to each cell, so that the probe can tell the order.

Source: attentive probing of frozen features as in V-JEPA (arXiv 2404.08471); time by sines as in "Attention Is All You
Need" (arXiv 1706.03762), section 3.5.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from common import load, log, parser, read_frames, run, save
from PIL import Image
from torch import Tensor

from dinov3_infer import Backbone, InputError
from dinov3_infer.tasks import AttentiveProbe, sheet

CELLS = 4  # per side: the patches of a frame are averaged in CELLS * CELLS cells
STRENGTH = 3.0  # weight of the time code, large because the features of all frames share most of their direction


def tokens(bb: Backbone, frames: Sequence[Image.Image], count: int, size: int) -> Tensor:
    """The tokens of a video for the probe, [count * CELLS^2, C], from `count` frames, evenly spread.

    Raises: InputError for a video without frames.
    """
    if not frames:
        raise InputError("the video holds no frames; give at least one")
    chosen = [frames[round(i)] for i in torch.linspace(0, len(frames) - 1, count).tolist()]
    side = max(1, size // bb.patch_size) * bb.patch_size
    maps = torch.cat([f.feature_map for f in bb.iter_features(chosen, size=side, fit="squash")])
    cells = F.normalize(F.adaptive_avg_pool2d(maps, CELLS).flatten(2).mT, dim=-1) * maps.shape[1] ** 0.5
    return (cells + time_code(count, maps.shape[1])[:, None]).flatten(0, 1)


def time_code(count: int, channels: int) -> Tensor:
    """Sines and cosines of the time, as a share of the video, [count, channels]."""
    passed = torch.linspace(0, 1, count)[:, None] * torch.logspace(0, 1.5, channels // 2)
    return torch.cat((passed.sin(), passed.cos()), dim=1) * STRENGTH


def train(features: Tensor, classes: Tensor, seed: int = 0) -> AttentiveProbe:
    """Trains a probe on videos [N, T, C], as `tokens` gives them, and their classes [N]."""
    epochs = max(10, 3600 // len(features))  # small batches and many epochs, because there are few videos
    return AttentiveProbe(learning_rates=(1e-3,), epochs=epochs, batch_size=16, seed=seed).fit(features, classes)


def main() -> None:
    options = parser(__doc__, "video.jpg", "videos", "clip", size=224)
    options.add_argument("--frames", type=int, default=8, help="frames used per video (default: %(default)s)")
    args = options.parse_args()
    videos = Path(args.videos)
    names = sorted(path.name for path in videos.iterdir() if path.is_dir())
    if len(names) < 2:
        raise InputError(f"'{args.videos}' has {len(names)} folders; make one folder per class, for at least 2 classes")
    bb, clip = load(args), read_frames(args.clip)
    known = [(path, number) for number, name in enumerate(names) for path in sorted((videos / name).iterdir())]
    log.info("computing features of %d videos, %d frames each", len(known), args.frames)
    features = torch.stack([tokens(bb, read_frames(str(path)), args.frames, args.size) for path, _ in known])
    log.info("training a probe")
    probe = train(features, torch.tensor([number for _, number in known]))
    chances = probe.predict_proba(tokens(bb, clip, args.frames, args.size)[None])[0].tolist()
    for name, chance in sorted(zip(names, chances, strict=True), key=lambda pair: -pair[1]):
        print(f"{chance:6.1%}  {name}")
    shown = [clip[round(i)] for i in torch.linspace(0, len(clip) - 1, 4).tolist()]
    best = max(range(len(names)), key=chances.__getitem__)
    save(sheet(shown, [f"{names[best]}, {chances[best]:.0%}", "", "", ""], columns=4), args.out)


if __name__ == "__main__":
    run(main)
