"""Adapts a released backbone to images of another kind: full tuning of the real DINOv2 ViT-S/14 on CIFAR-10.

    python tests/benchmarks/adaptation.py OUT [--steps 320] [--only plain gram]     # needs npm, pip, apt-get, dpkg-deb

The two runs differ only in Gram anchoring.  Measured before and after: 20-NN and a linear probe on class tokens at 112
pixels (training uses no classes and no test images), the relative change of the weights, and the quality of dense
features by one-shot segmentation of pasted cut-outs (nano/one_shot.py) at 448 pixels.  Each number is [value, lower
end, upper end] of a 95 % interval.  Interrupted runs are resumed.

The record is written to records/adaptation.json, the curves beside it.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from cifar10 import Pictures, accuracies, cifar10, vectors
from one_shot import Pair, pairs, segmentation

import dinov3_infer
from dinov3_infer import Backbone
from dinov3_infer.train import TrainConfig, train

RECORDS = Path(__file__).parent / "records"
SIDE, SETS = 112, ((3000, 1000), (6000, 3000))  # pixels; (training images, test images)
RUNS = {"plain": {}, "gram": dict(gram="start")}
SETTINGS = dict(
    global_px=SIDE, local_px=56, num_local=4, batch_size=32, precision="bfloat16", dino_prototypes=4096,
    ibot_prototypes=4096, lr_at_1024=6e-4, ema_momentum=0.95, ema_momentum_end=0.99, freeze_share=0.05,
    rope_rescale=1.0, health_steps=40, checkpoint_steps=40, health_pictures=512, workers=1,
)  # fmt: skip


def measured(model: Backbone, many: dict[str, list[Pair]], images: tuple) -> dict[str, object]:
    pixels, classes, asked, truth = images
    known, wanted = (vectors(part, model, SIDE) for part in (pixels[: SETS[-1][0]], asked[: SETS[-1][1]]))
    cifar = {f"{a}/{b}": accuracies(known[:a], classes[:a], wanted[:b], truth[:b]) for a, b in SETS}
    return {"cifar10": cifar, "iou": {task: segmentation(some, model) for task, some in many.items()}}


def moved(model: Backbone, start: Backbone) -> float:
    """Norm of the change of all weights, divided by the norm of all weights."""
    ours, theirs = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, start))
    return float((ours - theirs).norm() / theirs.norm())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=320, help="optimiser steps (default: 320)")
    parser.add_argument("--pairs", type=int, default=60, help="image pairs per one-shot task (default: 60)")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="runs to do (default: all)")
    parser.add_argument("--change", type=json.loads, default={}, help="settings of the trainer to change, as JSON")
    parser.add_argument("--weights", type=Path, help="folder with the ViT-S/14 (default: downloaded)")
    args = parser.parse_args()
    weights = args.weights
    if weights is None:
        from fetch import write_dinov2_vits14

        weights, _ = write_dinov2_vits14(args.out)
    start = Backbone.from_pretrained(weights)
    images, many = cifar10(50_000, 10_000), pairs(args.pairs)
    data = Pictures(*images[:2])
    target = RECORDS / "adaptation.json"

    def put(**found: object) -> None:
        """Adds to the record, which another process may have changed."""
        written = json.loads(target.read_text()) if target.is_file() else {}
        what = "DINOv2 ViT-S/14 (HF layout), full tuning on the 50,000 training pictures of CIFAR-10 without classes"
        versions = {"dinov3_infer": dinov3_infer.__version__, "torch": torch.__version__}
        print(found, flush=True)
        if not args.change:
            target.write_text(json.dumps(written | dict(what=what, versions=versions) | found, indent=1) + "\n")

    for name in args.only:
        folder = args.out / name
        config = TrainConfig(
            model=str(weights), out=str(folder), steps=args.steps, **(SETTINGS | RUNS[name] | args.change)
        )
        begun = time.perf_counter()
        model = train(config, data=data, resume=(folder / "checkpoints").is_dir())
        record = {
            "settings": {k: v for k, v in vars(config).items() if k not in ("model", "out", "data")},
            "minutes": round((time.perf_counter() - begun) / 60, 1),
            "threads": torch.get_num_threads(),
            "relative_change": moved(model, start),
            **measured(model, many, images),
            "curve": [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        }
        put(**{name: record})
        shutil.copy(folder / "curves.png", RECORDS / f"adaptation_{name}.png")
    if not target.is_file() or "start" not in json.loads(target.read_text()):
        put(start=measured(start, many, images))


if __name__ == "__main__":
    main()
