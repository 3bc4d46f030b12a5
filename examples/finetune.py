"""Adapt a backbone to a folder of pictures without labels, and see whether it helped.

    python examples/finetune.py PICTURES OUT [MODEL [STEPS]]

MODEL is a name ("vits16"), a hub id or a directory.  Where PICTURES has a folder per class, 20-NN before and after is
printed; the classes are not trained on.

This is preset "adapt" with Gram anchoring, for images of another kind.  configs/README.md says what to take for other
aims, and what that took where it was measured; `dinov3-infer train --help` lists everything that can be set.
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
    pictures, out, model, steps = given[0], given[1], given.get(2, "vits16"), int(given.get(3, 0))
    data = open_data(pictures)
    batch_size = min(32, len(data))
    config = TrainConfig(
        data=(pictures,),
        out=out,
        model=model,
        steps=steps or max(300, 10 * len(data) // batch_size),  # ten times through the pictures
        batch_size=batch_size,
        gram="start",  # similarities between patches stay near those of the start
        ema_momentum=0.95,  # the result is an average over the last hundred steps
        ema_momentum_end=0.99,
        health_steps=50,
    )
    print(f"{len(data)} pictures, {config.steps} steps of {config.batch_size}; watch {out}/metrics.jsonl")
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
