"""Adapts a backbone to a folder of images without labels, and measures whether it helped.

    python examples/finetune.py IMAGES OUT [MODEL [STEPS]]

MODEL is a name ("vits16"), a hub id or a directory.  If IMAGES has a folder per class, the accuracy of 20 nearest
neighbours is printed before and after; training does not use the classes.

The script uses the preset "adapt" with Gram anchoring, for images that differ from photographs.  configs/README.md says
which recipe fits which aim, with measured costs; `dinov3-infer train --help` lists all settings.
"""

import json
import sys
from pathlib import Path

from common import run

from dinov3_infer import Backbone
from dinov3_infer.train import TrainConfig, TrainingStopped, open_data, train


def main() -> None:
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    given = dict(enumerate(sys.argv[1:]))
    images, out, model, steps = given[0], given[1], given.get(2, "vits16"), int(given.get(3, 0))
    data = open_data(images)
    batch_size = min(32, len(data))
    config = TrainConfig(
        data=(images,),
        out=out,
        model=model,
        steps=steps or max(300, 10 * len(data) // batch_size),  # ten epochs
        batch_size=batch_size,
        gram="start",  # keeps similarities between patches near those of the start model
        ema_momentum=0.95,  # the result averages over about the last hundred steps
        ema_momentum_end=0.99,
        health_steps=50,
    )
    print(f"{len(data)} images, {config.steps} steps of {config.batch_size}; watch {out}/metrics.jsonl")
    try:
        train(config)
    except TrainingStopped as stopped:
        print(stopped)

    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    for row in (row for row in rows if "verdict" in row):
        accuracy = f", 20-NN {row['knn']:.3f}" if "knn" in row else ""
        print(f"step {row['step']:5d}: {row['verdict']}: {row['reason']}{accuracy}")

    width = Backbone.from_pretrained(Path(out) / "backbone").extract_features(data[0]).embedding.shape[1]
    print(f"{out}/backbone gives embeddings of width {width}; curves are in {out}/curves.png")


if __name__ == "__main__":
    run(main)
